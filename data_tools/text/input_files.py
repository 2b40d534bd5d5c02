"""Input files: paths on this machine, and files of stores and servers given by URL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megaphase.utils.files import real_path
from megaphase.utils.remote_files import RemoteFile

InputPath = Path | RemoteFile


@contextmanager
def open_input(path: InputPath) -> Iterator[BinaryIO]:
    """Open an input file for reading, at any position; see `RemoteFile.open`."""
    if isinstance(path, RemoteFile):
        with path.open() as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


def size_in_bytes(path: InputPath) -> int:
    """Return the size of an input file."""
    return path.size if isinstance(path, RemoteFile) else path.stat().st_size


def place_of(path: InputPath) -> str:
    """Return what is equal for two names of one file: its URL, or its absolute path."""
    return path.url if isinstance(path, RemoteFile) else os.path.abspath(path)


def identity(path: InputPath) -> list[str | int]:
    """Return what changes when the file is another one: place, size, and time of the last change
    or, of a remote one, its version."""
    if isinstance(path, RemoteFile):
        return [path.url, path.size, path.version]
    status = path.stat()
    return [str(real_path(path)), status.st_size, status.st_mtime_ns]
