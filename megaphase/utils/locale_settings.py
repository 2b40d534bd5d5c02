"""File names, arguments and files are UTF-8, whatever the locale says."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from megaphase.utils.errors import InputError
from megaphase.utils.signals import ALL_SIGNALS


def work_in_utf8() -> None:
    """Start this process again in Python's UTF-8 mode where its locale has another encoding.

    The terminal's encoding stays. Processes that are started later get the mode, too.
    """
    arguments = sys.argv[1:]
    if sys.getfilesystemencoding() == "utf-8" or sys.flags.utf8_mode:
        return
    if sys.orig_argv[len(sys.orig_argv) - len(arguments) :] != arguments:
        return  # this is not the process of the command alone
    if sys.stdout is not None:
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.environ["PYTHONUTF8"] = "1"
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)  # until it can take them again
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def require_utf8(arguments: Sequence[str]) -> None:
    """Refuse arguments, and a current directory, whose names are not UTF-8.

    JSON and YAML files, in which paths are stored, cannot hold such names, nor can several
    libraries open them.

    Raises:
        InputError: naming the first, its bytes as escapes.
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
    """Whether a name was UTF-8 when Python read it from the system; half a character is not."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def escaped(name: str) -> str:
    """A name that is not UTF-8 for a message: `caf\\xe9.jsonl`."""
    try:
        return repr(name.encode("utf-8", "surrogateescape"))[2:-1]
    except UnicodeEncodeError:
        return ascii(name)[1:-1]  # half of a surrogate pair, from a file that spells it
