"""Read all of a corpus and check every fact about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from megaphase.corpus import Corpus, Manifest
from megaphase.corpus.format import read_index
from megaphase.corpus.manifest import DATA_SUFFIXES, corpus_file
from megaphase.data_tools.progress import reading_progress
from megaphase.errors import InputError
from megaphase.files import hash_file

_CHUNK_ITEMS = 1 << 20
_REMEDY = "tokenize again"


def verify(prefix: Path, console: Console | None = None) -> Manifest:
    """Check a corpus: the hash of every file, and that lengths, offsets and tokens fit together.

    Memory does not grow with the corpus. Raises InputError that names the file and the first
    fault in it.
    """
    corpus = Corpus.open(prefix)
    total_bytes = sum(file.bytes for file in corpus.manifest.files.values())
    with reading_progress(console, f"verifying {prefix.name}", total_bytes) as advance:
        for suffix in DATA_SUFFIXES:
            _check_hash(prefix, suffix, corpus.manifest)
            size = corpus.manifest.files[suffix].bytes
            advance(size, size)
    _check_documents(corpus)
    _check_tokens(corpus)
    return corpus.manifest


def _check_hash(prefix: Path, suffix: str, manifest: Manifest) -> None:
    path = corpus_file(prefix, suffix)
    if hash_file(path) != manifest.files[suffix].hash:
        raise InputError(path, "was altered: its hash is not the manifest's", _REMEDY)


def _check_documents(corpus: Corpus) -> None:
    """Documents follow each other without gap, and each ends with EOD."""
    path = corpus_file(corpus.prefix, ".idx")
    boundaries = read_index(path).document_indices
    itemsize = corpus.tokens.itemsize
    end = 0
    for part in _slices(len(corpus.lengths)):
        lengths = corpus.lengths[part].astype(np.int64)
        _refuse(lengths < 1, part, path, "document {} has no token")
        ends = end + np.cumsum(lengths)
        starts = ends - lengths
        wrong = corpus.byte_offsets[part] != starts * itemsize
        _refuse(wrong, part, path, "document {} does not begin where the one before it ends")
        ascending = np.diff(boundaries[part.start : part.stop + 1]) > 0
        _refuse(~ascending, part, path, "document_indices do not ascend at document {}")
        if ends[-1] > corpus.manifest.tokens:
            break
        wrong = corpus.tokens[ends - 1] != corpus.manifest.eod
        bin_path = corpus_file(corpus.prefix, ".bin")
        _refuse(wrong, part, bin_path, "document {} does not end with EOD")
        end = int(ends[-1])
    if end != corpus.manifest.tokens:
        problem = f"its lengths do not sum to the {corpus.manifest.tokens:,} tokens of the .bin"
        raise InputError(path, problem, _REMEDY)


def _check_tokens(corpus: Corpus) -> None:
    path = corpus_file(corpus.prefix, ".bin")
    for part in _slices(len(corpus.tokens)):
        tokens = corpus.tokens[part]
        wrong = (tokens < 0) | (tokens >= corpus.manifest.vocab_size)
        _refuse(wrong, part, path, "token {} is not in the vocabulary")


def _refuse(wrong: np.ndarray, part: slice, path: Path, problem: str) -> None:
    """Raise InputError with the number of the first item that is wrong."""
    if wrong.any():
        number = part.start + int(np.argmax(wrong))
        raise InputError(path, problem.format(number), _REMEDY)


def _slices(items: int) -> Iterator[slice]:
    return (slice(i, min(i + _CHUNK_ITEMS, items)) for i in range(0, items, _CHUNK_ITEMS))
