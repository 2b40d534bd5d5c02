"""Which documents of a corpus are held out and which are trained on: ranges of their hashes.

A document's hash is that of its text, so the choice depends neither on the seed nor on the corpus's
order, and the same text is on the same side in every corpus that is split alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megaphase.utils.decimals import as_written

_HASHES = 1 << 64


@dataclass(frozen=True)
class HashRange:
    """The 64-bit hashes [first, last]; none where last is below first."""

    first: int
    last: int

    @classmethod
    def of(cls, start: int, stop: int) -> HashRange:
        """The hashes [start, stop)."""
        return cls(start, stop - 1) if start < stop else cls(1, 0)

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Whether each of these is one of them: u64 [n] to bool [n]."""
        return (hashes >= np.uint64(self.first)) & (hashes <= np.uint64(self.last))


def held_out_hashes(fraction: float) -> HashRange:
    """Hashes of the documents that are held out: the lowest, this fraction of all hashes."""
    return HashRange.of(0, _threshold(fraction))


def training_hashes(fraction: float, subsample: float = 1.0) -> HashRange:
    """Hashes of the documents that are trained on where this fraction is held out.

    Args:
        subsample: the part of the hashes that are not held out, in (0, 1]; the lowest are taken, so
            a smaller one takes a subset of what a larger one takes.
    """
    threshold = _threshold(fraction)
    return HashRange.of(threshold, threshold + int(as_written(subsample) * (_HASHES - threshold)))


def _threshold(fraction: float) -> int:
    return int(as_written(fraction) * _HASHES)
