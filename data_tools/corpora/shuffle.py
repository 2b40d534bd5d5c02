"""Put any number of documents into a random order: an external sort by random keys."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np

from megaphase.corpus import DocumentBatch
from megaphase.corpus.batch import join
from megaphase.corpus.origins import Origins
from megaphase.utils.seeds import derive_key

# Size of a document: its tokens and metadata. A bucket of at most this size is sorted in memory.
_BUCKET_BYTES = 32 << 20
_MOST_BUCKETS = 256  # each is an open file
_KEY_BITS = 64
_PARTS = ("tokens", "lengths", "hashes", "sums")
_ORIGINS = ("sources", "id_lengths", "ids")

# A batch with a sort key for every document, u64 [documents].
KeyedBatch = tuple[np.ndarray, DocumentBatch]


def shuffled(
    batches: Iterable[DocumentBatch], total_bytes: int, seed: int, folder: Path
) -> Iterator[DocumentBatch]:
    """Yield the documents of all batches, sorted by a random key made from the seed and the index.

    The order does not depend on how the documents are batched. Documents that do not fit into
    memory are written to anonymous files in `folder`, once or, beyond 8 GB, twice.

    Args:
        total_bytes: the approximate size of the tokens of all batches.
    """
    return _sorted(_keyed(batches, derive_key(seed, "shuffle")), total_bytes, 0, folder)


def is_sorted_on_disk(total_bytes: int) -> bool:
    """Return whether `shuffled` writes documents with so many bytes of tokens to files."""
    return total_bytes > _BUCKET_BYTES


def random_keys(first: int, count: int, key: int) -> np.ndarray:
    """Return u64 [count] for the indices from `first` on: SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = np.arange(first + 1, first + 1 + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _keyed(batches: Iterable[DocumentBatch], key: int) -> Iterator[KeyedBatch]:
    first = 0
    for batch in batches:
        yield random_keys(first, len(batch.lengths), key), batch
        first += len(batch.lengths)


def _sorted(
    batches: Iterable[KeyedBatch], total_bytes: int, used_bits: int, folder: Path
) -> Iterator[DocumentBatch]:
    """Sort by the keys, whose first `used_bits` bits are all equal."""
    if not is_sorted_on_disk(total_bytes) or used_bits == _KEY_BITS:
        if keyed := list(batches):
            # A stable sort: documents with equal keys keep their order.
            order = np.argsort(np.concatenate([keys for keys, _ in keyed]), kind="stable")
            yield join([batch for _, batch in keyed]).reorder(order)
        return
    wanted = min(-(-total_bytes // _BUCKET_BYTES) * 2, _MOST_BUCKETS)
    bits = min((wanted - 1).bit_length(), _KEY_BITS - used_bits)
    with ExitStack() as opened:
        buckets = [_Bucket(folder, opened) for _ in range(1 << bits)]
        for keys, batch in batches:
            shift = np.uint64(_KEY_BITS - used_bits - bits)
            chosen = (keys >> shift) & np.uint64(len(buckets) - 1)
            for number in np.unique(chosen).tolist():
                buckets[number].add(keys, batch, chosen == number)
        for bucket in buckets:
            if bucket.bytes:
                yield from _sorted(bucket.read(), bucket.bytes, used_bits + bits, folder)


class _Bucket:
    """Documents stored in an anonymous file."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self.bytes, self._with_origins, self._with_targets = 0, False, False
        self._file: IO[bytes] = opened.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115

    def add(self, keys: np.ndarray, batch: DocumentBatch, chosen: np.ndarray) -> None:
        """Append the documents that are marked in `chosen`, bool [documents]."""
        part = batch.select(chosen)
        arrays = [keys[chosen], *(getattr(part, name) for name in _PARTS)]
        if part.origins is not None:
            arrays += [getattr(part.origins, name) for name in _ORIGINS]
        self._with_origins = part.origins is not None
        if part.targets is not None:
            arrays.append(part.targets)
        self._with_targets = part.targets is not None
        for array in arrays:
            np.save(self._file, array, allow_pickle=False)
            self.bytes += array.nbytes

    def read(self) -> Iterator[KeyedBatch]:
        """Yield the stored documents; may be called once."""
        end = self._file.tell()
        self._file.seek(0)
        while self._file.tell() < end:
            keys, tokens, lengths, hashes, sums = (self._load() for _ in range(1 + len(_PARTS)))
            origins = Origins(*(self._load() for _ in _ORIGINS)) if self._with_origins else None
            targets = self._load() if self._with_targets else None
            yield keys, DocumentBatch(tokens, lengths, hashes, sums, origins, targets)

    def _load(self) -> np.ndarray:
        array: np.ndarray = np.load(self._file, allow_pickle=False)
        return array
