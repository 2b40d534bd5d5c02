"""Rename unexpected files at paths that a run needs, and report it."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

SUFFIX = ".set-aside"

Say = Callable[[str], object]


def say_on_standard_error(text: str) -> None:
    """Print a line to standard error, escaping what the terminal cannot show."""
    encoding = sys.stderr.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)


def shown_path(path: Path | str) -> str:
    """Return a path for a message; bytes of its name that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def kind_of(path: Path) -> str:
    """Return what kind of file exists at a path, in words; links are not followed."""
    mode = path.lstat().st_mode
    kinds = (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISREG, "a file"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for holds, name in kinds if holds(mode)), "a device")


def set_aside(path: Path, wanted: str, say: Say = say_on_standard_error) -> Path:
    """Rename the file at `path` to `NAME.set-aside` (or `NAME.set-aside-2` and so on if that
    exists), and report it in one line; returns the new path.

    wanted: what belongs at the path, with its article, for the message.

    Raises:
        OSError: it cannot be renamed.
    """
    kind = kind_of(path)
    names = (f"{path.name}{SUFFIX}" + (f"-{n}" if n > 1 else "") for n in count(1))
    aside = next(each for each in map(path.with_name, names) if not os.path.lexists(each))
    os.rename(path, aside)
    say(f"{shown_path(path)}: is {kind}, not {wanted}; it is renamed to {shown_path(aside.name)}")
    return aside


def make_way_for_directory(path: Path, wanted: str, say: Say = say_on_standard_error) -> None:
    """Set aside the file at `path`, unless it is a directory or a link to one."""
    if os.path.lexists(path) and not path.is_dir():
        set_aside(path, wanted, say)


def make_way_for_file(path: Path, wanted: str, say: Say = say_on_standard_error) -> None:
    """Set aside the file at `path`, unless it is a regular file or a link to one."""
    if os.path.lexists(path) and not path.is_file():
        set_aside(path, wanted, say)


def remove_leftover(path: Path, say: Say = say_on_standard_error) -> None:
    """Remove a directory or a link that a killed process of this program left at `path`.

    Anything else, or what cannot be removed, is set aside.
    """
    if not os.path.lexists(path):
        return
    kind = kind_of(path)
    if kind == "a symbolic link":
        path.unlink()
    elif kind == "a directory":
        shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        set_aside(path, "a leftover of this program", say)
