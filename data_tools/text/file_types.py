"""Which files hold text, and of which kind."""

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
    """What the file holds, by its name; `check_text_file` must have accepted it."""
    if path == STDIN:
        return stdin_kind
    return "parquet" if is_parquet(path) else _KINDS[_ending(path)]


def is_parquet(path: Path) -> bool:
    """Whether the name is that of a Parquet file."""
    return path.suffix.lower() == PARQUET_ENDING


def is_compressed(path: Path) -> bool:
    """Whether the file's bytes must be decompressed, from the first on."""
    return path.suffix.lower() in COMPRESSED_ENDINGS


def check_text_file(path: Path) -> None:
    """Raise InputError where `path` is no file, not of a kind that can be read here, or compressed
    or Parquet and empty."""
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
        # No part of such a file would be read, so that nobody would notice.
        raise InputError(path, "is cut off: it has no bytes", "copy or write it again")


def size_on_disk(path: Path) -> int:
    """Bytes of the file, which `begin` and `end` of `read_chunks` divide; 0 of standard input."""
    return 0 if path == STDIN else path.stat().st_size


def display_name(path: Path) -> str:
    """What messages call the file."""
    return "standard input" if path == STDIN else str(path)


def _ending(path: Path) -> str:
    """The file's ending in small letters, without that of a compression."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED_ENDINGS else name.suffix


def _require_pyarrow(path: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(path, "Parquet needs pyarrow", "pip install 'megaphase[parquet]'")
