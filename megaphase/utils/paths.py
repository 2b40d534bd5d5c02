"""Expand, resolve and check paths written by users."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from megaphase.utils.locale_settings import escaped, is_utf8
from megaphase.utils.names import shown

# Leaves room for file names and suffixes that are appended to a path.
MOST_BYTES_OF_PART = 240
MOST_BYTES = 3500


def resolved_path(path: str | Path, folder: Path) -> Path:
    """Return the path with `~` and `~name` expanded, relative to `folder` if it is not absolute.

    Raises:
        ValueError: there is no such user, or no file can have such a path.
    """
    whole = folder / expanded_path(path)
    if not is_utf8(str(whole)):  # the cause may be the name of the folder or of a home folder
        raise ValueError(f"the path {escaped(str(whole))} is not UTF-8; rename the folder or file")
    return whole


def expanded_path(path: str | Path) -> Path:
    """The path with `~` and `~name` expanded.

    Raises:
        ValueError: there is no such user, or no file can have such a path.
    """
    _check(path)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise ValueError(
            f"no home folder of {shown(user)} is known; write ~/ for your own, or ./{user} for a "
            "folder of that name"
        ) from None


def _check(path: str | Path) -> None:
    text = str(path)
    if any(unicodedata.category(each) == "Cc" for each in text):
        raise ValueError(f"the path {shown(text)} contains a control character; rename the file")
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        raise ValueError(
            f"the path {shown(text)} is not a valid file path; write another"
        ) from None
    longest = max(map(len, os.fsencode(text).split(b"/")))
    if size > MOST_BYTES or longest > MOST_BYTES_OF_PART:
        raise ValueError(
            f"the path {shown(text)} is too long; write at most {MOST_BYTES_OF_PART} bytes between "
            f"two slashes, and {MOST_BYTES:,} in all"
        )
