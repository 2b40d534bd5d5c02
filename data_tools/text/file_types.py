"""Recognize text files and their formats by name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

from megaphase.utils.errors import InputError

Kind = Literal["jsonl", "txt", "parquet"]

STDIN = Path("-")

COMPRESSED_ENDINGS = (".gz", ".zst")
PARQUET_ENDING = ".parquet"
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
}


def file_type_of(path: Path, stdin_kind: Kind) -> Kind:
    """Return the format of a file by its name, which `check_text_file` must have accepted."""
    if path == STDIN:
        return stdin_kind
    return "parquet" if is_parquet(path) else _KINDS[_ending(path)]


def is_parquet(path: Path) -> bool:
    """Return whether the name is that of a Parquet file."""
    return path.suffix.lower() == PARQUET_ENDING


def is_compressed(path: Path) -> bool:
    """Return whether the file must be decompressed from its first byte."""
    return path.suffix.lower() in COMPRESSED_ENDINGS


def check_text_file(path: Path) -> None:
    """Raise InputError if `path` is not a file of a supported format, or is compressed or Parquet
    and empty."""
    if path == STDIN:
        return
    if os.path.isdir(path):
        raise InputError(path, "is a directory", "give the files in it")
    if not os.path.exists(path):
        raise InputError(path, "no such file", "check the path")
    if not os.path.isfile(path):
        raise InputError(path, "is not a regular file", "write the text to a file, or pipe it to -")
    if is_parquet(path):
        _require_pyarrow(path)
    elif _ending(path) not in _KINDS:
        known = f"{', '.join(_KINDS)} [.gz|.zst], or {PARQUET_ENDING}"
        raise InputError(path, "unknown kind of file", f"its name must end in {known}")
    if (is_parquet(path) or is_compressed(path)) and os.path.getsize(path) == 0:
        # No part of an empty file is ever read, so nothing later would report it.
        raise InputError(path, "is truncated: it has no bytes", "copy or write it again")


def size_on_disk(path: Path) -> int:
    """Return the size of the file, which `begin` and `end` of `read_chunks` divide; 0 for stdin."""
    return 0 if path == STDIN else path.stat().st_size


def display_name(path: Path) -> str:
    """Return the name of the file for messages."""
    return "standard input" if path == STDIN else str(path)


def _ending(path: Path) -> str:
    """Return the file's extension in lower case, without that of a compression."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED_ENDINGS else name.suffix


def _require_pyarrow(path: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(path, "Parquet needs pyarrow", "pip install 'megaphase[parquet]'")
