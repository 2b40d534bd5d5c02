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
# Errors of paths that a user can give. All others are those of the machine or of a network file
# system, which may be gone at the next start.
_FAULTS_OF_PATHS = frozenset((
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EXDEV),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ),
    *(errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.ESPIPE, errno.EOPNOTSUPP),
))  # fmt: skip
_FAULTS_WITHOUT_PATH = NO_SPACE | {
    *(errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
}


def os_fault(error: OSError) -> InputError | RunError | None:
    """Interpret an OSError that no more specific code has handled.

    Returns RunError if the disk or the machine refused something, InputError if a path cannot be
    used, and None if the error names no file, which is a bug.
    """
    if error.filename is not None:
        return file_fault(_name(error.filename), error, "give another path", "cannot be used")
    if error.errno in _FAULTS_WITHOUT_PATH:
        return file_fault("a file", error, "")
    return None


def file_fault(
    path: object, error: OSError, remedy: str, problem: str = "cannot be read", *, where: str = ""
) -> InputError | RunError:
    """Return the error to raise for a file that cannot be read or written.

    It is an InputError with these parts if the path cannot be used, and a RunError if the disk or
    the machine refused something, after which a job is started again.

    Args:
        problem: of the InputError, before the reason.
        where: file and key of the InputError, if they are not the path itself.
    """
    reason = error.strerror or str(error)
    if error.errno in _FAULTS_OF_PATHS:
        told = f"{path} {problem}" if where else problem
        return InputError(where or path, f"{told} ({reason})", remedy)
    verb = "written" if error.errno in NO_SPACE else "read or written"
    return RunError(f"{path}: cannot be {verb} ({reason})")


def _name(filename: object) -> str:
    return repr(filename)[2:-1] if isinstance(filename, bytes) else str(filename)
