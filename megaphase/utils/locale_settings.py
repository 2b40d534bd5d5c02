"""Use UTF-8 for file names, arguments and files in every locale."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from megaphase.utils.errors import InputError
from megaphase.utils.signals import ALL_SIGNALS


def work_in_utf8() -> None:
    """Restart this process in Python's UTF-8 mode if its locale has another encoding.

    The terminal's encoding is kept. Child processes inherit the mode.
    """
    arguments = sys.argv[1:]
    if sys.getfilesystemencoding() == "utf-8" or sys.flags.utf8_mode:
        return
    if sys.orig_argv[len(sys.orig_argv) - len(arguments) :] != arguments:
        return  # the process does not belong to the command alone
    if sys.stdout is not None:
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.environ["PYTHONUTF8"] = "1"
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)  # until it has handlers again
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def require_utf8(arguments: Sequence[str]) -> None:
    """Reject arguments, and a current directory, whose names are not UTF-8.

    JSON and YAML files, in which paths are stored, cannot contain such names, and several libraries
    cannot open them.

    Raises:
        InputError: names the first one, with its bytes escaped.
    """
    for argument in arguments:
        if not is_utf8(argument):
            problem = "this argument is not UTF-8"
            raise InputError(escaped(argument), problem, "convert the text, or rename the file")
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        problem = "does not exist any more"
        raise InputError("the current directory", problem, "change to another one") from None
    if not is_utf8(folder):
        raise InputError(escaped(folder), "the current directory's name is not UTF-8", "rename it")


def is_utf8(name: str) -> bool:
    """Return whether a name, as Python read it from the system, is UTF-8 without surrogates."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def escaped(name: str) -> str:
    """Return a name that is not UTF-8 with escapes, such as `caf\\xe9.jsonl`, for a message."""
    try:
        return repr(name.encode("utf-8", "surrogateescape"))[2:-1]
    except UnicodeEncodeError:
        return ascii(name)[1:-1]  # a lone surrogate, from a file that spells it
