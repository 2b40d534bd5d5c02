"""Expand file names and patterns given by the user."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from megaphase.data_tools.text.file_types import STDIN, check_text_file, display_name
from megaphase.utils.errors import InputError
from megaphase.utils.locale_settings import escaped, is_utf8


def expand_inputs(arguments: Sequence[str]) -> list[Path]:
    """Return the text files named by file names and patterns (*, ?, [...], ** for any folders).

    The order of the arguments is kept; matches of a pattern are sorted as in a shell, without
    directories. `-` is standard input.

    Raises InputError if a pattern matches nothing, or a file is missing, has no supported format
    or is given twice.
    """
    paths: list[Path] = []
    seen: set[str] = set()
    for argument in arguments:
        for path in _files_of(argument):
            check_text_file(path)
            if (place := os.path.abspath(path)) in seen:
                raise InputError(display_name(path), "is given twice", "leave one out")
            seen.add(place)
            paths.append(path)
    return paths


def _files_of(argument: str) -> list[Path]:
    # A name that exists is not a pattern, even if it contains a bracket.
    if Path(argument) == STDIN or not glob.has_magic(argument) or os.path.exists(argument):
        return [Path(argument)]
    found = sorted(name for name in glob.glob(argument, recursive=True) if not os.path.isdir(name))
    if not found:
        raise InputError(argument, "no file matches", "check the pattern")
    for name in found:
        if not is_utf8(name):
            raise InputError(escaped(name), "the name of this file is not UTF-8", "rename it")
    return [Path(name) for name in found]
