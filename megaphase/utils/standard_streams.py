"""Make standard output and error robust against any character, a full disk and a closed pipe."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, Any

from megaphase.utils.errors import RunError

if TYPE_CHECKING:
    from rich.console import Console

# Width of tables in files and pipes, where no line needs to be folded.
PLAIN_WIDTH = 160

# Error handlers that can write every character.
_ERRORS_THAT_WRITE_ALL = ("replace", "backslashreplace", "xmlcharrefreplace", "namereplace")


class _StandardStream(io.FileIO):
    """A file descriptor that the process inherited at its start.

    If the stream is only a log (`is_log`), output that cannot be written is dropped. If it carries
    a command's result, the first failure raises BrokenPipeError if the reader has closed the pipe,
    else RunError.
    """

    def __init__(self, descriptor: int, what: str, *, is_log: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.is_log = is_log
        self._what = what
        self._failed = False

    def write(self, content: Any) -> int:
        """Return the number of bytes taken: all of them if they are dropped."""
        try:
            while (count := super().write(content)) is None:  # it is full, and non-blocking
                select.select([], [self], [])
            return count
        except OSError as error:
            # Once a failure has been reported, flushing the buffers must not raise again.
            if not self.is_log and not self._failed:
                self._failed = True
                if isinstance(error, BrokenPipeError):
                    raise
                raise RunError(f"{self._what} cannot be written ({error.strerror})") from None
            return memoryview(content).nbytes


def prepare_streams() -> None:
    """Let standard output and error accept every character, and let standard error never fail.

    A character that the encoding lacks is written as an escape such as `\\xd7`. Streams that are
    closed when the process starts are opened on /dev/null.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    # Replaced streams, such as those of a capturing test, are left alone.
    if sys.stdout is sys.__stdout__:
        sys.stdout = sys.__stdout__ = _text_stream(  # type: ignore[misc]
            sys.stdout, _StandardStream(1, "standard output", is_log=False)
        )
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _text_stream(  # type: ignore[misc]
            sys.stderr, _StandardStream(2, "standard error", is_log=True)
        )


def standard_output_is_a_log() -> None:
    """Drop output that standard output does not accept, from now on.

    For commands that write their results to files and print only progress.
    """
    stream = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(stream, _StandardStream):
        stream.is_log = True


def new_console(*, stderr: bool = False, highlight: bool = True) -> Console:
    """Return a console that prints text literally, without interpreting brackets and colons."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=highlight, markup=False, emoji=False)


def new_table_console() -> Console:
    """Likewise, on standard output, and wide enough for tables where that is no terminal."""
    console = new_console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def _text_stream(former: Any, stream: _StandardStream) -> io.TextIOWrapper:
    if former is None:  # the stream was closed when the process started
        return io.TextIOWrapper(io.BufferedWriter(stream), "utf-8", line_buffering=True)
    errors = former.errors if former.errors in _ERRORS_THAT_WRITE_ALL else "backslashreplace"
    return io.TextIOWrapper(
        io.BufferedWriter(stream),
        former.encoding,
        errors,
        line_buffering=former.line_buffering,
        write_through=former.write_through,
    )
