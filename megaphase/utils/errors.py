"""What the command line turns into one line on standard error and an exit code."""

from __future__ import annotations

import errno

from megaphase.utils.names import printable

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130

_LONGEST_LINE = 2000


class InputError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, the key or place in it, and the remedy.
    Nothing has been written, or what was written aside has been removed, when it is raised.
    """

    def __init__(self, where: object, problem: str, remedy: str = "") -> None:
        self.where = str(where)
        self.problem = problem
        self.remedy = remedy
        text = f"{self.where}: {problem}" if self.where else problem
        super().__init__(one_line(f"{text}; {remedy}" if remedy else text))

    def __reduce__(self) -> tuple[object, ...]:
        # Otherwise an error that comes from another process could not be unpickled.
        return InputError, (self.where, self.problem, self.remedy)


def one_line(text: str) -> str:
    """The text without line breaks and control characters, cut in its middle where it is long."""
    if len(text) > _LONGEST_LINE:
        half = _LONGEST_LINE // 2
        text = f"{text[:half]} … {text[-half:]}"
    return printable(text)


class RunError(Exception):
    """What was asked for is right, but could not be done: a process was killed, a disk is full.

    The message is one line; the command line prints it and ends with exit code 1.
    """


class LostProcessError(RunError):
    """A collective broke off, outside of the watchdog's sight: another process must have ended."""


class Stopped(Exception):
    """A signal asked the run to stop, and it did so after a checkpoint; all ranks raise it.

    The message is one line: which signal came to which rank, and what was saved. The command line
    prints it and ends with exit code 75, on which a batch system may queue the job again.
    """


class EndedAtOnce(Exception):
    """Ctrl-C came again while what the first one had asked for was under way: all was killed.

    The message is one line: what is lost, and what the same command does. The command line prints
    it and ends with exit code 130.
    """


class Interrupted(KeyboardInterrupt):
    """A signal ended a command that had nothing to save: Ctrl-C, SIGTERM or SIGUSR1.

    name: of the signal, as it is told to people. exit_code: what the command line ends with.
    """

    def __init__(self, name: str, exit_code: int) -> None:
        self.name, self.exit_code = name, exit_code
        super().__init__(name)


def exit_code(error: InputError | RunError | Stopped | EndedAtOnce) -> int:
    """What the command line ends with on an error that it foresees."""
    if isinstance(error, EndedAtOnce):
        return EXIT_INTERRUPTED
    if isinstance(error, InputError):
        return EXIT_WRONG_INPUT
    return EXIT_REQUEUE if isinstance(error, Stopped) else EXIT_FAILED


# With which a write fails that would have been right on a larger disk.
NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
# Of which no path that the user gives can be the cause.
_FAULTS_OF_THE_MACHINE = NO_SPACE | {
    *(errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
}


def os_fault(error: OSError) -> InputError | RunError | None:
    """What an error of the operating system means where nothing nearer to it has said so.

    RunError for what a disk or the machine refuses, InputError for a path that cannot be used;
    None for an error that names no file, which is one of the program.
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
