"""A translation task's stream: whole pairs packed into samples, loss on their targets alone.

A document is a source, the tag, a target and EOD; what stands after the tag is scored. Documents
are packed next-fit in the order of epoch 0's keyed permutation, at most seq_len + 1 tokens a
sample, and none is cut that fits into one; what stays empty has no target. Every epoch has the same
samples, so an epoch's number of samples is one number, and permutes all of them anew.
"""

from __future__ import annotations

import numpy as np

from megaphase.plan import _builder
from megaphase.plan.stream import DOCUMENTS_PER_CALL, Stream

# Starts that are counted at a time, to be thrown away.
COUNTED_STARTS = 1 << 16


class PackedStream(Stream):
    """A stream of translation pairs; its index holds one epoch, however many a run has.

    Attributes:
        samples_per_epoch: of at most seq_len + 1 tokens, the same in every epoch.
    """

    def _samples_in_an_epoch(self) -> int:
        walk, starts = self.walk(0), np.empty((COUNTED_STARTS, 2), self.start_dtype)
        samples = 0
        while not walk.at_end:
            samples += walk.fill(starts, DOCUMENTS_PER_CALL)
        return samples

    def index_sizes(self, ordinals: int) -> list[int]:
        """The one epoch that an index for the ordinals [0, ordinals) holds, if any."""
        return [self.samples_per_epoch] if ordinals else []

    def first_indexed_epoch(self, first_ordinal: int) -> int:
        """0: all epochs need the one that the index holds."""
        return 0

    def walk(self, epoch: int) -> _builder.StreamWalk:
        """A walk through an epoch's samples in token order, the same for all epochs."""
        return super().walk(0)

    def in_token_order(self, ordinals: np.ndarray) -> np.ndarray:
        """The numbers in token order of the samples with these ordinals, int64 [n]."""
        return self._shuffled(ordinals, max(1, self.samples_per_epoch))

    def index_rows(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of the index that say where the samples with these numbers begin, int64 [n]."""
        return numbers % self.samples_per_epoch

    def pieces(self, epoch: int, slot: int, offset: int) -> list[tuple[int, int, int]]:
        """(document, offset, tokens) of the pieces that make up the sample that begins there."""
        return super().pieces(0, slot, offset)
