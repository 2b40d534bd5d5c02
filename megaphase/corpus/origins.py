"""The origins of a corpus's documents: each document's own id, and the file that contained it.

They are stored in two more files; corpora of earlier versions, and those whose documents have no
known origin, have neither. Training does not read them.

| file      | holds |
| --------- | --- |
| P.sources | SOURCE_DTYPE per document: end of its id in P.ids, index of its file in `sources` |
| P.ids     | the ids of all documents as UTF-8, one after the other; one may be empty |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megaphase.corpus.manifest import IDS_SUFFIX, SOURCES_SUFFIX, Manifest, corpus_file
from megaphase.utils.errors import InputError

SOURCE_DTYPE = np.dtype([("id_end", "<u8"), ("source", "<u4")])
UNKNOWN_SOURCE = 0xFFFFFFFF
_REMEDY = "tokenize again"


@dataclass(frozen=True)
class Origins:
    """The origins of some documents.

    Attributes:
        sources: u32 [documents], the index of each document's file; UNKNOWN_SOURCE if not known.
        id_lengths: i64 [documents], size of each document's id in bytes.
        ids: u8 [sum of id_lengths], UTF-8.
    """

    sources: np.ndarray
    id_lengths: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[bytes], source: int) -> Origins:
        """Return the origins of documents of one file with these ids."""
        return cls(
            np.full(len(ids), source, np.uint32),
            np.fromiter(map(len, ids), np.int64, len(ids)),
            np.frombuffer(b"".join(ids), np.uint8),
        )

    @classmethod
    def unknown(cls, documents: int) -> Origins:
        """Return the origins of `documents` documents about which nothing is known."""
        return cls.of([b""] * documents, UNKNOWN_SOURCE)

    def select(self, keep: np.ndarray) -> Origins:
        """Return the origins of the documents marked in `keep`, bool [documents]."""
        ids = self.ids[np.repeat(keep, self.id_lengths)]
        return Origins(self.sources[keep], self.id_lengths[keep], ids)

    def reorder(self, order: np.ndarray) -> Origins:
        """Return the origins of the documents in another order, integers [documents]."""
        parts = np.split(self.ids, np.cumsum(self.id_lengths)[:-1])
        ids = np.concatenate([self.ids[:0], *(parts[i] for i in order)])
        return Origins(self.sources[order], self.id_lengths[order], ids)

    def renumbered(self, numbers: np.ndarray) -> Origins:
        """Replace each file index i by `numbers`[i], u32 [files]."""
        known = self.sources != UNKNOWN_SOURCE
        sources = np.full(len(self.sources), UNKNOWN_SOURCE, np.uint32)
        sources[known] = numbers[self.sources[known]]
        return Origins(sources, self.id_lengths, self.ids)

    def stored(self, first_byte: int) -> np.ndarray:
        """Return SOURCE_DTYPE [documents] as stored in P.sources; `first_byte`: size of P.ids
        before."""
        stored = np.empty(len(self.sources), SOURCE_DTYPE)
        stored["source"] = self.sources
        stored["id_end"] = first_byte + np.cumsum(self.id_lengths)
        return stored


def join_origins(parts: Sequence[Origins]) -> Origins:
    """Concatenate the origins of several batches."""
    return Origins(
        np.concatenate([part.sources for part in parts]),
        np.concatenate([part.id_lengths for part in parts]),
        np.concatenate([part.ids for part in parts]),
    )


class Origin(NamedTuple):
    """The origin of one document: its id and its file, each None if it is not known."""

    id: str | None
    source: str | None


class StoredOrigins:
    """The origins of a corpus's documents, memory-mapped."""

    def __init__(self, prefix: Path, manifest: Manifest) -> None:
        """
        Raises:
            InputError: a file is missing, or does not fit the manifest or the other one.
        """
        for suffix in (SOURCES_SUFFIX, IDS_SUFFIX):
            path = corpus_file(prefix, suffix)
            if not path.is_file():
                raise InputError(path, "no such file", _REMEDY)
            size, expected = path.stat().st_size, manifest.files[suffix].bytes
            if size != expected:
                raise InputError(path, f"has {size} bytes, the manifest says {expected}", _REMEDY)
        self._names = manifest.sources
        self._rows = _mapped(corpus_file(prefix, SOURCES_SUFFIX), SOURCE_DTYPE)
        self._ids = _mapped(corpus_file(prefix, IDS_SUFFIX), np.dtype(np.uint8))
        self._path = corpus_file(prefix, SOURCES_SUFFIX)
        end = int(self._rows["id_end"][-1]) if len(self._rows) else 0
        if len(self._rows) != manifest.documents or end != len(self._ids):
            raise InputError(self._path, f"does not fit its {IDS_SUFFIX} or the manifest", _REMEDY)

    def __getitem__(self, document: int) -> Origin:
        """Return the origin of one document; raise InputError if the files were altered."""
        part = self.part(document, 1)
        source = int(part.sources[0])
        try:
            name = None if source == UNKNOWN_SOURCE else self._names[source]
            return Origin(part.ids.tobytes().decode() or None, name)
        except (IndexError, UnicodeDecodeError):
            problem = f"was altered: it has no valid origin for document {document}"
            raise InputError(self._path, problem, _REMEDY) from None

    def part(self, first: int, count: int) -> Origins:
        """Return the origins of `count` documents from `first` on, as views."""
        rows = self._rows[first : first + count]
        begin = int(self._rows["id_end"][first - 1]) if first else 0
        ends = rows["id_end"].astype(np.int64)
        lengths = np.diff(ends, prepend=begin)
        if (lengths < 0).any() or (len(ends) and ends[-1] > len(self._ids)):
            problem = f"was altered: the ids from document {first} on do not ascend"
            raise InputError(self._path, problem, _REMEDY)
        end = int(ends[-1]) if len(ends) else begin
        return Origins(rows["source"].astype(np.uint32), lengths, self._ids[begin:end])


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
