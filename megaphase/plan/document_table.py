"""A table of samples that consist of parts of documents, packed by best fit.

A part is (document, first, targets): the tokens [first, first + targets) of a document as targets;
the token before the first one is the input from which it is predicted. A part with first = 0 begins
its document; its first token is predicted from BOS or, without BOS, from the end of the document
before it, and is no target where it begins a sample. A table has a line of positions of its own:
one for every target of its samples, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from megaphase.plan import _builder
from megaphase.plan.verified_file import VerifiedArray

# Parts that are packed together; memory is bounded by those of a few windows.
PACKING_WINDOW = 1 << 18

# A piece of a document: its number in the corpus, the first token and the number of tokens.
Piece = tuple[int, int, int]

# Samples whose parts are read at once from a table that is packed anew.
_SAMPLES_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class PackedSource:
    """What is packed into samples.

    Attributes:
        fingerprint: of everything that determines the table.
        what: in words, for the display of progress.
        seq_len: positions of a sample.
        bos: whether documents begin with BOS.
        dtype: of the numbers of a part.
        targets: about how many targets it has, for the display of progress.
        chunks: yields its parts in order, int64 [parts, 3].
    """

    fingerprint: str
    what: str
    seq_len: int
    bos: bool
    dtype: type[np.generic]
    targets: int
    chunks: Callable[[], Iterator[np.ndarray]]

    def packed(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the parts of the next samples, int64 [parts, 3], and their numbers of parts."""
        for window in _windows(self.chunks()):
            yield _builder.pack_parts(window, self.seq_len, self.bos)


def _windows(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the parts in arrays of PACKING_WINDOW, the last of which is smaller."""
    held: list[np.ndarray] = []
    room = PACKING_WINDOW
    for rest in chunks:
        while len(rest):
            held.append(rest[:room])
            rest = rest[room:]
            room -= len(held[-1])
            if room == 0:
                yield _joined(np.concatenate(held))
                held, room = [], PACKING_WINDOW
    if held:
        yield _joined(np.concatenate(held))


def _joined(parts: np.ndarray) -> np.ndarray:
    """Join neighbours that continue each other."""
    document, first, targets = parts.T
    continues = (document[1:] == document[:-1]) & (first[1:] == first[:-1] + targets[:-1])
    if not continues.any():
        return parts
    begins = np.flatnonzero(np.concatenate([[True], ~continues]))
    return np.stack([document[begins], first[begins], np.add.reduceat(targets, begins)], axis=1)


@dataclass(frozen=True)
class DocumentTable:
    """Packed samples.

    Attributes:
        fingerprint: of everything that determines it.
        parts: u32 or u64 [parts, 3], see above; like the others verified when it is read.
        first_parts: int64 [samples + 1], the first part of each sample.
        positions: int64 [samples + 1], the position at which each sample begins.
        filled: positions of all samples that have an input, which are at most those of targets.
    """

    fingerprint: str
    parts: VerifiedArray
    first_parts: VerifiedArray
    positions: VerifiedArray
    filled: int

    @property
    def samples(self) -> int:
        """The number of its samples."""
        return len(self.positions) - 1

    @property
    def end(self) -> int:
        """The position after the last one."""
        return int(self.positions.rows(self.samples, self.samples + 1)[0])

    def of_samples(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the parts of some samples, int64 [parts, 3], and how many each has."""
        firsts, lasts = self.first_parts.at(numbers), self.first_parts.at(numbers + 1)
        parts = [
            self.parts.rows(a, b) for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True)
        ]
        return _concatenated(parts), lasts - firsts

    def between(self, first: int, last: int) -> np.ndarray:
        """Return the parts at the positions [first, last), int64 [parts, 3]."""
        positions = self.positions.whole()
        sample = np.searchsorted(positions, np.int64(first), side="right") - 1
        end = np.searchsorted(positions, np.int64(last), side="left")
        rows = self.first_parts.at(np.array([sample, end])).tolist()
        parts: np.ndarray = self.parts.rows(*rows).astype(np.int64)
        ends = positions[sample] + np.cumsum(parts[:, 2])
        begins = ends - parts[:, 2]
        inside = (ends > first) & (begins < last)
        parts, begins, ends = parts[inside], begins[inside], ends[inside]
        skipped, missing = np.maximum(first - begins, 0), np.maximum(ends - last, 0)
        parts[:, 1] += skipped
        parts[:, 2] -= skipped + missing
        return parts

    def in_ranges(
        self, ranges: np.ndarray, firsts: np.ndarray, lasts: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the parts of `count` samples, and how many each has; the arguments are those that
        Remainder.fragments returns."""
        found = [self.between(a, b) for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True)]
        sizes = np.zeros(count, np.int64)
        np.add.at(sizes, ranges, [len(parts) for parts in found])
        return _concatenated(found), sizes

    def chunks(self, firsts: np.ndarray, lasts: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the parts at the positions of some ranges, int64 [parts, 3]."""
        positions = self.positions.whole()
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            while first < last:
                sample = int(np.searchsorted(positions, np.int64(first), side="right")) - 1
                end = min(last, int(positions[min(sample + _SAMPLES_AT_ONCE, self.samples)]))
                yield self.between(first, end)
                first = end


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty((0, 3), np.int64), *parts]).astype(np.int64, copy=False)


def pieces_of_parts(parts: np.ndarray) -> list[list[Piece]]:
    """Return the pieces of tokens of some parts, int64 [parts, 3], each as a fragment."""
    return [
        [(document, max(first - 1, 0), targets + (first > 0))]
        for document, first, targets in parts.tolist()
    ]


def filled_positions(parts: np.ndarray, sizes: np.ndarray, bos: bool) -> int:
    """Return the positions that have an input; without BOS, a document's first token has none where
    it begins a sample."""
    ends = np.cumsum(sizes)
    begins_document = parts[ends - sizes, 1] == 0
    return int(parts[:, 2].sum()) - (0 if bos else int(begins_document.sum()))
