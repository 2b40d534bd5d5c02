"""Where the tables of packed documents are stored: in a run's directory of plans.

A table is a folder, `documents-FINGERPRINT`, published by renaming, of

    parts        u32 or u64 [parts, 3], see document_table.py
    first_parts  i64 [samples + 1]
    positions    i64 [samples + 1]
    index.json   their sizes and hashes

Plans, also of branches, that pack the same documents in the same way share it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from megaphase.plan.build_pool import ReportProgress
from megaphase.plan.built_folder import (
    INDEX_FILE,
    Discard,
    Say,
    ensure_folder,
    open_files,
    read_header,
    stored_damage,
)
from megaphase.plan.document_table import DocumentTable, PackedSource, filled_positions
from megaphase.plan.hashed_chunks import HashedChunkWriter
from megaphase.plan.verified_file import ALTERED_FILE, VerifiedArray, VerifiedFile
from megaphase.utils.errors import InputError
from megaphase.utils.files import (
    atomic_write_json,
    directory_written_aside,
    with_hash,
)

FORMAT_VERSION = 1
_ARRAYS = ("parts", "first_parts", "positions")
_TABLE = "documents-"
# Pattern of the folders of stored tables.
TABLES = f"{_TABLE}*"
_OF_A_TABLE = re.compile("|".join([re.escape(INDEX_FILE), ALTERED_FILE, *_ARRAYS]))


class DocumentTables:
    """The tables of one task's documents.

    Attributes:
        folder: where they are stored; None: they are kept in memory.
        read_only: whether those that are not stored there are kept in memory as well.
        say: called with sentences for the user.
        progress: called while a table is built.
        files: those of the stored tables that have been opened.
        whole: whether to verify every byte of a large table when it is opened.
        headers: the content of `index.json` of tables that are known to be usable, by fingerprint.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.read_only = False
        self.say: Say = lambda _: None
        self.progress: ReportProgress = lambda *_: None
        self.whole = False
        self.files: list[VerifiedFile] = []
        self.headers: dict[str, dict[str, Any]] = {}
        self._tables: dict[str, DocumentTable] = {}
        self._counts: dict[str, int] = {}
        self._lock = RLock()

    def samples(self, source: PackedSource) -> int:
        """Return the number of samples of a table, which is only counted where it is not known in
        which folder to store it."""
        with self._lock:
            if source.fingerprint not in self._counts:
                if self.folder is not None:
                    return self.table(source).samples
                count = sum(len(sizes) for _, sizes in source.packed())
                self._counts[source.fingerprint] = count
            return self._counts[source.fingerprint]

    def table(self, source: PackedSource) -> DocumentTable:
        """Return a table; build it unless it is stored.

        Raises:
            InputError: the corpus changed meanwhile.
            RunError: the disk cannot be written.
        """
        with self._lock:
            table = self._tables.get(source.fingerprint)
            if table is None:
                table = self._stored(source) if self.folder else _in_memory(source)
                self._tables[source.fingerprint] = table
                known = self._counts.setdefault(source.fingerprint, table.samples)
                if known != table.samples:
                    raise InputError(source.what, "changed while it was read", "start again")
            return table

    def is_stored(self, fingerprint: str) -> bool:
        """Return whether a table is in the folder; it may turn out to be damaged."""
        return self.folder is not None and _folder_of(self.folder, fingerprint).is_dir()

    def _stored(self, source: PackedSource) -> DocumentTable:
        assert self.folder is not None
        folder = _folder_of(self.folder, source.fingerprint)
        header = self.headers.get(source.fingerprint)
        if header is None:
            damage = partial(_damage, source, whole=self.whole)
            if self.read_only and damage(folder) is not None:
                return _in_memory(source)
            build = partial(_build, source, self.progress)
            ensure_folder(folder, damage, build, _OF_A_TABLE, self.say)
            header = read_header(folder)
            self.headers[source.fingerprint] = header
        files = open_files(folder, header)
        self.files += files.values()
        parts = VerifiedArray.of(files["parts"], source.dtype, 3)
        first_parts, positions = (VerifiedArray.of(files[name], np.int64) for name in _ARRAYS[1:])
        return DocumentTable(source.fingerprint, parts, first_parts, positions, header["filled"])


def table_bytes(parts: int, samples: int, dtype: type[np.generic]) -> int:
    """Return the size of the arrays of a table; dtype: of the numbers of a part."""
    ends = 2 * (samples + 1) * np.dtype(np.int64).itemsize
    return 3 * parts * np.dtype(dtype).itemsize + ends


def _folder_of(tables: Path, fingerprint: str) -> Path:
    return tables / f"{_TABLE}{fingerprint[:16]}"


def _damage(source: PackedSource, folder: Path, *, whole: bool) -> str | None:
    fingerprint = source.fingerprint
    return stored_damage(folder, FORMAT_VERSION, fingerprint, "table", threads=2, whole=whole)


def _write(
    source: PackedSource,
    write: Callable[[str, np.ndarray], object],
    progress: ReportProgress,
) -> int:
    """Pack, and hand over the arrays in pieces; return the filled positions."""
    largest = (1 << 8 * np.dtype(source.dtype).itemsize) - 1
    parts_done = done = filled = 0
    for name in _ARRAYS[1:]:
        write(name, np.zeros(1, np.int64))
    for parts, sizes in source.packed():
        if parts.max(initial=0) > largest:
            raise InputError(source.what, "has a document of 2^32 tokens or more", "split it")
        ends = np.cumsum(sizes)
        positions = np.cumsum(parts[:, 2])
        write("parts", parts.astype(source.dtype))
        write("first_parts", parts_done + ends)
        write("positions", done + positions[ends - 1])
        filled += filled_positions(parts, sizes, source.bos)
        parts_done += len(parts)
        done += int(positions[-1])
        progress(source.what, min(done, source.targets), source.targets)
    return filled


def _in_memory(source: PackedSource) -> DocumentTable:
    pieces: dict[str, list[np.ndarray]] = {"parts": [np.empty((0, 3), source.dtype)]}
    filled = _write(
        source, lambda name, piece: pieces.setdefault(name, []).append(piece), lambda *_: None
    )
    parts, first_parts, positions = (
        VerifiedArray(np.concatenate(pieces[name])) for name in _ARRAYS
    )
    return DocumentTable(source.fingerprint, parts, first_parts, positions, filled)


def _build(source: PackedSource, progress: ReportProgress, folder: Path, discard: Discard) -> None:
    """Write a table and publish it as `folder`."""
    with (
        directory_written_aside(folder, discard) as aside,
        ThreadPoolExecutor(1, thread_name_prefix="plan-flusher") as flusher,
        open(aside / "parts", "wb", buffering=0) as parts,
        open(aside / "first_parts", "wb", buffering=0) as first_parts,
        open(aside / "positions", "wb", buffering=0) as positions,
    ):
        files = zip(_ARRAYS, (parts, first_parts, positions), strict=True)
        writers = {name: HashedChunkWriter(file.fileno(), 0, flusher) for name, file in files}
        filled = _write(source, lambda name, piece: writers[name].write(piece), progress)
        pieces = {name: writer.finish() for name, writer in writers.items()}
        header = {
            "format": FORMAT_VERSION,
            "fingerprint": source.fingerprint,
            "filled": filled,
            "files": {
                name: {"bytes": sum(size for _, size, _ in each), "pieces": each}
                for name, each in pieces.items()
            },
        }
        atomic_write_json(aside / INDEX_FILE, with_hash(header))
