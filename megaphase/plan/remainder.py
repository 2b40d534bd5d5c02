"""The rest of an epoch that samples of one length have left for samples of another length.

An epoch of T tokens has T - 1 positions: the token at position p is the input from which token
p + 1, its target, is predicted. A sample takes consecutive positions of those that are left, so
that across any number of changes every position is used exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megaphase.plan.document_table import DocumentTable
from megaphase.utils.files import hash_json, new_hash


@dataclass(frozen=True)
class Remainder:
    """The positions of an epoch that are left, as intervals in ascending order.

    Attributes:
        epoch: its number; what follows the remainder is the next epoch. -1 before the first one.
        cuts: how often the length or the cut has changed within this epoch.
        firsts, lasts: int64 [intervals]; an interval is [first, last), not empty, and does not
            touch its neighbours.
        table: if given, positions are those of this table of packed documents, not of the epoch.
    """

    epoch: int
    cuts: int
    firsts: np.ndarray
    lasts: np.ndarray
    table: DocumentTable | None = None

    @classmethod
    def nothing(cls, epoch: int = -1) -> Remainder:
        """Return the remainder of an epoch that has been used up."""
        return cls(epoch, 0, np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def whole(cls, epoch: int, positions: int) -> Remainder:
        """Return all `positions` positions of an epoch."""
        return cls(epoch, 0, np.zeros(1, np.int64), np.full(1, positions, np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of which positions of which epoch or table they are."""
        digest = new_hash()
        for array in (self.firsts, self.lasts):
            digest.update(np.ascontiguousarray(array))
        of = self.epoch if self.table is None else self.table.fingerprint
        return hash_json([of, digest.hexdigest()])

    @property
    def positions(self) -> int:
        """The number of positions that are left."""
        return int((self.lasts - self.firsts).sum())

    def fragments(
        self, firsts: np.ndarray, lasts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which positions of the epoch some ranges of what is left are.

        firsts, lasts: int64 [ranges], counted over what is left; not empty

        Returns (range, first, last) of every fragment, int64 [fragments], those of a range after
        those of the range before.
        """
        ends = np.cumsum(self.lasts - self.firsts)
        begins = ends - (self.lasts - self.firsts)
        first_interval = np.searchsorted(ends, firsts, side="right")
        last_interval = np.searchsorted(begins, lasts, side="left") - 1
        counts = last_interval - first_interval + 1
        ranges = np.repeat(np.arange(len(firsts)), counts)
        within = np.arange(len(ranges)) - np.repeat(np.cumsum(counts) - counts, counts)
        intervals = first_interval[ranges] + within
        skipped = np.maximum(firsts[ranges] - begins[intervals], 0)
        missing = np.maximum(ends[intervals] - lasts[ranges], 0)
        return ranges, self.firsts[intervals] + skipped, self.lasts[intervals] - missing

    def keep(self, firsts: np.ndarray, lasts: np.ndarray) -> Remainder:
        """Return what is left when all is used but some ranges, in ascending order, see
        `fragments`."""
        _, begin, end = self.fragments(firsts, lasts)
        if len(begin) == 0:
            return Remainder.nothing(self.epoch)
        is_new = np.concatenate([[True], begin[1:] != end[:-1]])
        is_last = np.concatenate([is_new[1:], [True]])
        return replace(self, cuts=self.cuts + 1, firsts=begin[is_new], lasts=end[is_last])

    def of_table(self, table: DocumentTable, cuts: int) -> Remainder:
        """Return the same intervals as positions of a table."""
        return replace(self, table=table, cuts=cuts)
