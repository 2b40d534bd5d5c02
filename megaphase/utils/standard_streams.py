"""Standard output and error: no character, full disk or departed reader of theirs ends a run."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, Any

from megaphase.utils.errors import RunError

if TYPE_CHECKING:
    from rich.console import Console

# Handlers with which every character can be written, one way or another.
_ERRORS_THAT_WRITE_ALL = ("replace", "backslashreplace", "xmlcharrefreplace", "namereplace")


class _StandardStream(io.FileIO):
    """A file descriptor that the process was started with.

    What cannot be written is dropped where the stream is only a log (`is_log`). Where it carries a
    command's result the first failure is raised: BrokenPipeError if its reader has left, else
    RunError.
    """

    def __init__(self, descriptor: int, what: str, *, is_log: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.is_log = is_log
        self._what = what
        self._failed = False

    def write(self, content: Any) -> int:
        """How many bytes were taken: all, where they are dropped."""
        try:
            while (count := super().write(content)) is None:  # it is full, and set not to block
                select.select([], [self], [])
            return count
        except OSError as error:
            # Once the failure has been said, what is left in the buffers must not raise again.
            if not self.is_log and not self._failed:
                self._failed = True
                if isinstance(error, BrokenPipeError):
                    raise
                raise RunError(f"{self._what} cannot be written ({error.strerror})") from None
            return memoryview(content).nbytes


def prepare_streams() -> None:
    """Let standard output and error take every character, and standard error any failure.

    A character that their encoding lacks is written as an escape such as `\\xd7`. Streams that the
    process was started without lead to /dev/null.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    # Others, as those of a test that captures them, are left alone.
    if sys.stdout is sys.__stdout__:
        sys.stdout = sys.__stdout__ = _text_stream(  # type: ignore[misc]
            sys.stdout, _StandardStream(1, "standard output", is_log=False)
        )
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _text_stream(  # type: ignore[misc]
            sys.stderr, _StandardStream(2, "standard error", is_log=True)
        )


def standard_output_is_a_log() -> None:
    """What standard output does not take is dropped from now on.

    For commands whose result are files, and which print only how far they have come.
    """
    stream = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(stream, _StandardStream):
        stream.is_log = True


def new_console(*, stderr: bool = False, highlight: bool = True) -> Console:
    """A console that prints text as it is: brackets and colons of a user's names mean nothing."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=highlight, markup=False, emoji=False)


def _text_stream(former: Any, stream: _StandardStream) -> io.TextIOWrapper:
    if former is None:  # the process was started without it
        return io.TextIOWrapper(io.BufferedWriter(stream), "utf-8", line_buffering=True)
    errors = former.errors if former.errors in _ERRORS_THAT_WRITE_ALL else "backslashreplace"
    return io.TextIOWrapper(
        io.BufferedWriter(stream),
        former.encoding,
        errors,
        line_buffering=former.line_buffering,
        write_through=former.write_through,
    )
