"""Expand file names, patterns, folders and URLs given by the user."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from megaphase.data_tools.text.file_types import STDIN, check_text_file, display_name
from megaphase.data_tools.text.input_files import InputPath, place_of
from megaphase.data_tools.text.saved_datasets import dataset_files
from megaphase.utils.errors import InputError
from megaphase.utils.locale_settings import escaped, is_utf8
from megaphase.utils.remote_calls import first_failure_said
from megaphase.utils.remote_files import describe, find, is_url, kind_of_url
from megaphase.utils.set_aside import say_on_standard_error


def expand_inputs(arguments: Sequence[str]) -> list[InputPath]:
    """Return the text files named by file names, URLs and patterns (*, ?, [...], ** for any
    folders).

    The order of the arguments is kept; matches of a pattern are sorted as in a shell, without
    directories. A folder that `datasets` wrote with save_to_disk means its files, in the order of
    the rows. `-` is standard input.

    Raises InputError if a pattern matches nothing, or a file is missing, has no supported format
    or is given twice; RemoteError if a store cannot be reached.
    """
    paths: list[InputPath] = []
    seen: set[str] = set()
    for argument in arguments:
        for path in _remote_files_of(argument) if is_url(argument) else _files_of(argument):
            check_text_file(path)
            if (place := place_of(path)) in seen:
                raise InputError(display_name(path), "is given twice", "leave one out")
            seen.add(place)
            paths.append(path)
    return paths


def _remote_files_of(argument: str) -> Sequence[InputPath]:
    with first_failure_said(say_on_standard_error):
        return _found_in_store(argument)


def _found_in_store(argument: str) -> Sequence[InputPath]:
    if glob.has_magic(argument):
        if not (found := find(argument)):
            raise InputError(argument, "no file matches", "check the pattern")
        return found
    if kind_of_url(argument) == "directory":
        files = dataset_files(argument)
        if files is not None:
            return [describe(file) for file in files]
    return [describe(argument)]


def _files_of(argument: str) -> list[Path]:
    if os.path.isdir(argument) and (files := dataset_files(argument)) is not None:
        return [Path(file) for file in files]
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
