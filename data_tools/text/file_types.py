"""Recognize text files and their formats by name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

from megaphase.data_tools.text.input_files import InputPath, size_in_bytes
from megaphase.utils.errors import InputError

Kind = Literal["jsonl", "txt", "parquet", "arrow"]
# The formats whose documents are rows; pyarrow reads them.
ROW_KINDS = ("parquet", "arrow")

STDIN = Path("-")

COMPRESSED_ENDINGS = (".gz", ".zst")
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}


def file_type_of(path: InputPath, stdin_kind: Kind) -> Kind:
    """Return the format of a file by its name, which `check_text_file` must have accepted."""
    if path == STDIN:
        return stdin_kind
    return _KINDS[_ending(path)]


def has_rows(path: InputPath) -> bool:
    """Return whether the name is that of a Parquet or Arrow file."""
    return path != STDIN and _KINDS.get(path.suffix.lower()) in ROW_KINDS


def is_compressed(path: InputPath) -> bool:
    """Return whether the file must be decompressed from its first byte."""
    return path.suffix.lower() in COMPRESSED_ENDINGS


def check_text_file(path: InputPath) -> None:
    """Raise InputError if `path` is not a file of a supported format, or is compressed, Parquet
    or Arrow and empty."""
    if path == STDIN:
        return
    if isinstance(path, Path):
        _check_regular(path)
    if has_rows(path):
        _require_pyarrow(path)
    elif _KINDS.get(_ending(path)) not in ("jsonl", "txt"):
        rows = [ending for ending, kind in _KINDS.items() if kind in ROW_KINDS]
        known = f"{', '.join(e for e in _KINDS if e not in rows)} [.gz|.zst], or {', '.join(rows)}"
        raise InputError(path, "unknown kind of file", f"its name must end in {known}")
    if (has_rows(path) or is_compressed(path)) and size_in_bytes(path) == 0:
        # No part of an empty file is ever read, so nothing later would report it.
        raise InputError(path, "is truncated: it has no bytes", "copy or write it again")


def _check_regular(path: Path) -> None:
    if os.path.isdir(path):
        remedy = "give the files in it, or a folder that datasets wrote with save_to_disk"
        raise InputError(path, "is a directory", remedy)
    if not os.path.exists(path):
        raise InputError(path, "no such file", "check the path")
    if not os.path.isfile(path):
        raise InputError(path, "is not a regular file", "write the text to a file, or pipe it to -")


def size_on_disk(path: InputPath) -> int:
    """Return the size of the file, which `begin` and `end` of `read_chunks` divide; 0 for stdin."""
    return 0 if path == STDIN else size_in_bytes(path)


def display_name(path: InputPath) -> str:
    """Return the name of the file for messages."""
    return "standard input" if path == STDIN else str(path)


def _ending(path: InputPath) -> str:
    """Return the file's extension in lower case, without that of a compression."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED_ENDINGS else name.suffix


def _require_pyarrow(path: InputPath) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        name = str(_KINDS[path.suffix.lower()]).capitalize()
        raise InputError(path, f"{name} needs pyarrow", "pip install 'megaphase[parquet]'")
