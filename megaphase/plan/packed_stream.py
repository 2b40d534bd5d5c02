"""A translation task's stream: whole pairs packed into samples, with loss on the targets only.

A document is a source, the tag, a target and EOD; the loss covers the tokens after the tag.
Documents are packed next-fit in the order of epoch 0's keyed permutation, at most seq_len + 1
tokens per sample, and none is split that fits into one; the rest of a sample has no targets. All
epochs have the same samples in different permutations.
"""

from __future__ import annotations

import numpy as np

from megaphase.plan import _builder
from megaphase.plan.document_table import Piece
from megaphase.plan.remainder import Remainder
from megaphase.plan.stream import Stream
from megaphase.plan.task_documents import DOCUMENTS_PER_CALL

# Number of starts that are counted at a time, without storing them.
COUNTED_STARTS = 1 << 16


class PackedStream(Stream):
    """A stream of translation pairs; its index stores one epoch for any number of epochs.

    Attributes:
        samples_per_epoch: number of samples of at most seq_len + 1 tokens, the same in all epochs.
    """

    def _samples_in_an_epoch(self) -> int:
        walk, starts = self.walk(0), np.empty((COUNTED_STARTS, 2), self.start_dtype)
        samples = 0
        while not walk.at_end:
            samples += walk.fill(starts, DOCUMENTS_PER_CALL)
        return samples

    def index_sizes(self, ordinals: int) -> list[int]:
        """Return the size of the one epoch that an index for the ordinals [0, ordinals) stores."""
        return [self.samples_per_epoch] if ordinals else []

    def walk(self, epoch: int) -> _builder.StreamWalk:
        """Return a walk through an epoch's samples in token order, the same for all epochs."""
        return super().walk(0)

    def in_token_order(self, ordinals: np.ndarray) -> np.ndarray:
        """Convert ordinals to sample numbers in token order, int64 [n]."""
        return self._shuffled(ordinals, max(1, self.samples_per_epoch))

    def index_rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the rows of the index that store where these samples begin, int64 [n]."""
        return numbers % self.samples_per_epoch

    def sample_pieces(
        self, starts: np.ndarray, number: int, rest: Remainder | None = None
    ) -> list[list[Piece]]:
        """Return the pieces of a sample, as one fragment; see Stream."""
        slot, offset = starts[number % self.samples_per_epoch].tolist()
        return [self.pieces(0, slot, offset)]

    def pieces(self, epoch: int, slot: int, offset: int) -> list[tuple[int, int, int]]:
        """Return (document, offset, tokens) of the pieces of the sample that begins there."""
        return super().pieces(0, slot, offset)
