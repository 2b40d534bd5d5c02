"""Split a corpus's documents into validation, training and test documents, by ranges of hashes.

A document's hash is that of its text, so the split depends neither on the seed nor on the order of
the corpus, and the same text is in the same part in every corpus with the same fractions. From the
lowest hash to the highest, the parts are: documents held out for validation, those trained on,
those that a subsample leaves out, the test split. So a larger held-out or test fraction takes
documents from training alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megaphase.utils.decimals import as_written

Split = Literal["training", "validation", "test", "training sample"]
"""A part of a task's documents; "training sample": those trained on, in an order that does not
depend on the seed."""

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


def hashes_of_test_split(fraction: float) -> HashRange:
    """Return the hashes of the test split: the highest `fraction` of all hashes."""
    return HashRange.of(_HASHES - _threshold(fraction), _HASHES)


def training_hashes(fraction: float, subsample: float = 1.0, test: float = 0.0) -> HashRange:
    """Return the hashes of the training documents if `fraction` is held out for validation.

    Args:
        subsample: the fraction of the remaining hashes to train on, in (0, 1]; the lowest are
            taken, so a smaller subsample is part of a larger one.
        test: the fraction of all hashes in the test split, which is not among the remaining ones.
    """
    first, end = _threshold(fraction), _HASHES - _threshold(test)
    return HashRange.of(first, first + int(as_written(subsample) * (end - first)))


def _threshold(fraction: float) -> int:
    return int(as_written(fraction) * _HASHES)
