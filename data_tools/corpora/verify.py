"""Read a corpus completely and verify it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from megaphase.corpus import Corpus, DocumentBatch, Manifest
from megaphase.corpus.batch import batches_of, checksums
from megaphase.corpus.block_sums import BlockSums
from megaphase.corpus.format import read_index
from megaphase.corpus.manifest import BLOCKS_SUFFIX, corpus_file
from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_file, new_hash
from megaphase.utils.progress import reading_progress

Advance = Callable[[int], object]

_INDEX_ITEMS = 1 << 20
_REMEDY = "tokenize again"


def verify_corpus(prefix: Path, console: Console | None = None) -> Manifest:
    """Verify the hash of every file, and that lengths, offsets and tokens are consistent.

    Memory does not grow with the corpus. Raises InputError with the file, the first fault in it
    and the document that contains it.
    """
    corpus = Corpus.open(prefix)
    with reading_progress(console, f"verifying {prefix.name}", size_of(corpus)) as advance:
        for _ in checked_batches(corpus, lambda size: advance(size, size)):
            pass
    return corpus.manifest


def size_of(corpus: Corpus) -> int:
    """Return the number of bytes that `checked_batches` reads."""
    return sum(file.bytes for file in corpus.manifest.files.values())


def checked_batches(
    corpus: Corpus, advance: Advance = lambda size: None
) -> Iterator[DocumentBatch]:
    """Yield all documents in batches and verify them in the same reading.

    A fault in a batch is raised before the batch is yielded; a wrong file hash only at the end.
    Raises InputError as `verify` does.
    """
    manifest, prefix = corpus.manifest, corpus.prefix
    for suffix, record in manifest.files.items():
        if suffix not in (".bin", ".hash", ".sum"):
            if not corpus_file(prefix, suffix).is_file():
                raise InputError(corpus_file(prefix, suffix), "no such file", _REMEDY)
            altered = hash_file(corpus_file(prefix, suffix)) != record.hash
            fault = _index_fault(corpus) if suffix == ".idx" else None
            if altered:
                raise _altered(prefix, suffix, f" ({fault})" if fault else "")
            if fault:
                raise InputError(corpus_file(prefix, suffix), fault, _REMEDY)
            advance(record.bytes)
    blocks = _BlockComparison(corpus)
    digests = {".bin": new_hash(), ".hash": new_hash(), ".sum": new_hash()}
    first = 0
    for batch in batches_of(corpus):
        _check_tokens(corpus, batch, first)
        sizes = 0
        for suffix, array in (
            (".bin", batch.tokens),
            (".hash", batch.hashes),
            (".sum", batch.sums),
        ):
            digests[suffix].update(np.ascontiguousarray(array).view(np.uint8))
            sizes += array.nbytes
        advance(sizes)
        blocks.add(batch.tokens)
        yield batch
        first += len(batch.lengths)
    altered_files = [
        suffix
        for suffix, digest in digests.items()
        if digest.hexdigest() != manifest.files[suffix].hash
    ]
    if altered_files:
        raise _altered_document(corpus, altered_files[0])
    blocks.finish()


class _BlockComparison:
    """Compares the blocks of a .bin, while it is read, with the checksums in .blocks, if any."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus, self._computed = corpus, BlockSums()
        self._compared = 0
        self._wrong: int | None = None

    def add(self, tokens: np.ndarray) -> None:
        """Add the next tokens of the .bin."""
        if self._corpus.blocks is not None:
            self._compare(self._computed.add(np.ascontiguousarray(tokens).view(np.uint8)))

    def finish(self) -> None:
        """Raise InputError if the checksum of a block was wrong."""
        self._compare(self._computed.end())
        if self._wrong is not None:
            path = corpus_file(self._corpus.prefix, BLOCKS_SUFFIX)
            problem = f"the checksum of block {self._wrong} is not that of its bytes in the .bin"
            raise InputError(path, problem, _REMEDY)

    def _compare(self, sums: np.ndarray) -> None:
        if self._corpus.blocks is None or self._wrong is not None:
            return
        stored = self._corpus.blocks[self._compared : self._compared + len(sums)]
        wrong = np.flatnonzero(stored != sums)
        if len(wrong):
            self._wrong = self._compared + int(wrong[0])
        self._compared += len(sums)


def _altered(prefix: Path, suffix: str, where: str = "") -> InputError:
    problem = f"was altered{where}: its hash differs from the manifest's"
    return InputError(corpus_file(prefix, suffix), problem, _REMEDY)


def _altered_document(corpus: Corpus, suffix: str) -> InputError:
    """Return the error with the first document whose checksum does not match."""
    first = 0
    for batch in batches_of(corpus):
        found = _first_altered(batch)
        if found is not None:
            return _altered(corpus.prefix, suffix, _place(corpus, suffix, first + found))
        first += len(batch.lengths)
    return _altered(corpus.prefix, suffix)


def _place(corpus: Corpus, suffix: str, document: int) -> str:
    if suffix != ".bin":
        return f" at document {document}"
    begin = int(corpus.byte_offsets[document])
    end = begin + int(corpus.lengths[document]) * corpus.tokens.itemsize
    return f" in document {document} (bytes {begin:,} to {end - 1:,})"


def _first_altered(batch: DocumentBatch) -> int | None:
    found = checksums(batch.tokens, batch.lengths, batch.hashes, batch.sums["text_bytes"])
    wrong = np.flatnonzero(found != batch.sums["checksum"])
    return int(wrong[0]) if len(wrong) else None


def _index_fault(corpus: Corpus) -> str | None:
    """Return a description of the first document that does not directly follow another, or None."""
    boundaries = read_index(corpus_file(corpus.prefix, ".idx")).document_indices
    itemsize = corpus.tokens.itemsize
    end = 0
    for first in range(0, len(corpus.lengths), _INDEX_ITEMS):
        part = slice(first, min(first + _INDEX_ITEMS, len(corpus.lengths)))
        lengths = corpus.lengths[part].astype(np.int64)
        ends = end + np.cumsum(lengths)
        for wrong, fault in (
            (lengths < 1, "document {} has no token"),
            (
                corpus.byte_offsets[part] != (ends - lengths) * itemsize,
                "document {} does not begin where the one before it ends",
            ),
            (
                np.diff(boundaries[part.start : part.stop + 1]) < 1,
                "document_indices do not ascend at document {}",
            ),
        ):
            if wrong.any():
                return fault.format(first + int(np.argmax(wrong)))
        end = int(ends[-1])
    if end != corpus.manifest.tokens:
        return f"its lengths do not sum to the {corpus.manifest.tokens:,} tokens of the .bin"
    return None


def _check_tokens(corpus: Corpus, batch: DocumentBatch, first: int) -> None:
    """Raise InputError unless all tokens are in the vocabulary and every document ends with EOD.

    Args:
        first: index of the batch's first document.
    """
    tokens, manifest = batch.tokens, corpus.manifest
    ends = np.cumsum(batch.lengths, dtype=np.int64)
    if tokens.max() < manifest.vocab_size and (tokens.dtype.kind == "u" or tokens.min() >= 0):
        not_ended = tokens[ends - 1] != manifest.eod
        if not not_ended.any():
            return
        document, problem = int(np.argmax(not_ended)), "does not end with EOD"
    else:
        at = int(np.argmax((tokens < 0) | (tokens >= manifest.vocab_size)))
        document = int(np.searchsorted(ends, at, side="right"))
        problem = f"has the token {tokens[at]}, the vocabulary ends at {manifest.vocab_size - 1}"
    altered = _first_altered(batch)
    if altered is not None:
        raise _altered(corpus.prefix, ".bin", _place(corpus, ".bin", first + altered))
    # The checksum matches the tokens, so the corpus was written with the fault.
    path = corpus_file(corpus.prefix, ".bin")
    raise InputError(path, f"document {first + document} {problem}", _REMEDY)
