"""Exceptions that the command line turns into one line on standard error and an exit code."""

from __future__ import annotations

import errno

from megaphase.utils.names import printable

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130

_LONGEST_LINE = 2000


class InputError(Exception):
    """The user's input is invalid.

    The message is one line with the file, the key or position in it, and the remedy. When it is
    raised, nothing has been written, or temporary output has been removed.
    """

    def __init__(self, where: object, problem: str, remedy: str = "") -> None:
        self.where = str(where)
        self.problem = problem
        self.remedy = remedy
        text = f"{self.where}: {problem}" if self.where else problem
        super().__init__(one_line(f"{text}; {remedy}" if remedy else text))

    def __reduce__(self) -> tuple[object, ...]:
        # Without this, an error raised in another process could not be unpickled.
        return type(self), (self.where, self.problem, self.remedy)


def one_line(text: str) -> str:
    """Return the text on one line, without control characters, shortened in the middle if long."""
    if len(text) > _LONGEST_LINE:
        half = _LONGEST_LINE // 2
        text = f"{text[:half]} … {text[-half:]}"
    return printable(text)


class RunError(Exception):
    """A valid request failed while running: a process was killed, or a disk is full.

    The message is one line; the command line prints it and ends with exit code 1.
    """


class LostProcessError(RunError):
    """A collective failed without the watchdog noticing: another process must have ended."""


class Stopped(Exception):
    """A signal stopped the run after it had saved a checkpoint; all ranks raise this.

    The message is one line with the signal, the rank that received it and what was saved. The
    command line prints it and exits with code 75, upon which a batch system may requeue the job.
    """


class EndedAtOnce(Exception):
    """A second Ctrl-C arrived while the first one was being handled; everything was killed.

    The message is one line: what is lost, and what running the command again does. The command line
    prints it and exits with code 130.
    """


class Interrupted(KeyboardInterrupt):
    """A signal (Ctrl-C, SIGTERM or SIGUSR1) ended a command that had nothing to save.

    name: the signal's name for messages. exit_code: the exit code of the command.
    """

    def __init__(self, name: str, exit_code: int) -> None:
        self.name, self.exit_code = name, exit_code
        super().__init__(name)


def exit_code(error: InputError | RunError | Stopped | EndedAtOnce) -> int:
    """Return the command's exit code for one of these errors."""
    if isinstance(error, EndedAtOnce):
        return EXIT_INTERRUPTED
    if isinstance(error, InputError):
        return EXIT_WRONG_INPUT
    return EXIT_REQUEUE if isinstance(error, Stopped) else EXIT_FAILED


# Errors of writes that would succeed on a larger disk.
NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
# Errors that no path given by the user can cause.
_FAULTS_OF_THE_MACHINE = NO_SPACE | {
    *(errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
}


def os_fault(error: OSError) -> InputError | RunError | None:
    """Interpret an OSError that no more specific code has handled.

    Returns RunError if the disk or the machine refused something, InputError if a path cannot be
    used, and None if the error names no file, which is a bug.
    """
    reason = error.strerror or str(error)
    if error.errno in _FAULTS_OF_THE_MACHINE:
        where = "a file" if error.filename is None else _name(error.filename)
        verb = "written" if error.errno in NO_SPACE else "read or written"
        return RunError(f"{where}: cannot be {verb} ({reason})")
    if error.filename is None:
        return None
    return InputError(_name(error.filename), f"cannot be used ({reason})", "give another path")


def _name(filename: object) -> str:
    return repr(filename)[2:-1] if isinstance(filename, bytes) else str(filename)
