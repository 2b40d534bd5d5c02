"""Split a corpus's documents into held-out and training documents, by ranges of their hashes.

A document's hash is that of its text, so the split depends neither on the seed nor on the order of
the corpus, and the same text is in the same part in every corpus with the same fractions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megaphase.utils.decimals import as_written

_HASHES = 1 << 64


@dataclass(frozen=True)
class HashRange:
    """The 64-bit hashes [first, last]; empty if last < first."""

    first: int
    last: int

    @classmethod
    def of(cls, start: int, stop: int) -> HashRange:
        """Return the range of the hashes [start, stop)."""
        return cls(start, stop - 1) if start < stop else cls(1, 0)

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Return whether each hash is in the range: u64 [n] to bool [n]."""
        return (hashes >= np.uint64(self.first)) & (hashes <= np.uint64(self.last))


def held_out_hashes(fraction: float) -> HashRange:
    """Return the hashes of the held-out documents: the lowest `fraction` of all hashes."""
    return HashRange.of(0, _threshold(fraction))


def training_hashes(fraction: float, subsample: float = 1.0) -> HashRange:
    """Return the hashes of the training documents if `fraction` is held out.

    Args:
        subsample: the fraction of the remaining hashes to train on, in (0, 1]; the lowest are
            taken, so a smaller subsample is part of a larger one.
    """
    threshold = _threshold(fraction)
    return HashRange.of(threshold, threshold + int(as_written(subsample) * (_HASHES - threshold)))


def _threshold(fraction: float) -> int:
    return int(as_written(fraction) * _HASHES)
