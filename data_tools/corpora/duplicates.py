"""Find documents that occur more than once in corpora, with a sort on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np

from megaphase.corpus import Corpus
from megaphase.corpus.format import SUM_DTYPE

# Documents whose keys are read at a time, and documents per bucket, which is sorted in memory.
_READ_DOCUMENTS = 1 << 20
_BUCKET_DOCUMENTS = 1 << 20
_MOST_BUCKETS = 512  # each is an open file

_ENTRY = np.dtype([("text", "<u8"), ("rest", "<u8"), ("document", "<u8")])


def find_duplicates(corpora: Sequence[Corpus], folder: Path) -> np.ndarray:
    """Return, for every document of the corpora in order, whether it repeats an earlier one.

    Two documents are equal if the hashes and sizes of their texts and the checksums of their
    tokens are: 128 bits. The keys are scattered over anonymous files in `folder`, 24 bytes per
    document, and each file is sorted in memory, so memory does not grow with the corpora (up to
    5e8 documents; beyond that, it takes a fifth of a byte per document).

    Returns bool [documents], memory-mapped from an anonymous file in `folder`.
    """
    total = sum(len(corpus.hashes) for corpus in corpora)
    if total == 0:
        return np.zeros(0, bool)
    buckets = min(-(-total // _BUCKET_DOCUMENTS), _MOST_BUCKETS)
    found = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the map keeps it
    # Not a sparse file: a disk that fills up under a map would end the process without a word.
    os.posix_fallocate(found.fileno(), 0, total)
    is_duplicate = np.memmap(found, dtype=bool, mode="r+")
    with ExitStack() as opened:
        files = [opened.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(buckets)]
        first = 0
        for corpus in corpora:
            for start in range(0, len(corpus.hashes), _READ_DOCUMENTS):
                entries = _entries(corpus, slice(start, start + _READ_DOCUMENTS), first + start)
                _scatter(entries, files)
            first += len(corpus.hashes)
        for file in files:
            file.seek(0)
            entries = np.frombuffer(file.read(), dtype=_ENTRY)
            is_duplicate[_repeated(entries)] = True
    return is_duplicate


def _entries(corpus: Corpus, part: slice, first: int) -> np.ndarray:
    hashes = corpus.hashes[part]
    entries = np.empty(len(hashes), _ENTRY)
    entries["text"] = hashes
    entries["rest"] = np.ascontiguousarray(corpus.sums[part], SUM_DTYPE).view("<u8")
    entries["document"] = np.arange(first, first + len(hashes), dtype=np.uint64)
    return entries


def _scatter(entries: np.ndarray, files: Sequence[IO[bytes]]) -> None:
    """Append each entry to the file chosen by the hash of its text."""
    chosen = entries["text"] % np.uint64(len(files))
    order = np.argsort(chosen, kind="stable")
    ends = np.cumsum(np.bincount(chosen.astype(np.int64), minlength=len(files)))
    for file, part in zip(files, np.split(entries[order], ends[:-1]), strict=True):
        file.write(part.tobytes())


def _repeated(entries: np.ndarray) -> np.ndarray:
    """Return the documents of a bucket, whose entries are in order, that repeat an earlier one."""
    ordered = entries[np.lexsort((entries["rest"], entries["text"]))]  # stable
    before, after = ordered[:-1], ordered[1:]
    same = (before["text"] == after["text"]) & (before["rest"] == after["rest"])
    documents: np.ndarray = after["document"][same]
    return documents
