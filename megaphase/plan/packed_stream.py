"""A stream of translation pairs or chats: whole ones packed into samples, with loss on a part.

A pair is a source, the tag, a target and EOD; the loss covers the tokens after the tag. Of a chat
it covers the tokens that the corpus marks, those of the assistant.
Documents are packed next-fit in the order of epoch 0's keyed permutation, at most seq_len + 1
tokens per sample, and none is split that fits into one; the rest of a sample has no targets. All
epochs have the same samples in different permutations.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Self

import numpy as np

from megaphase.plan import _builder
from megaphase.plan.document_table import Piece
from megaphase.plan.packed_remainder import PackedRemainder
from megaphase.plan.stream import Starts, Stream
from megaphase.plan.task_documents import DOCUMENTS_PER_CALL
from megaphase.plan.verified_file import holding
from megaphase.utils.targets import IGNORED_TARGET

# Number of starts that are counted at a time, without storing them.
COUNTED_STARTS = 1 << 16


class PackedStream(Stream):
    """A stream of translation pairs or chats; its index stores one epoch for any number of epochs.

    Attributes:
        samples_per_epoch: number of samples of at most seq_len + 1 tokens, the same in all epochs.
    """

    def _samples_in_an_epoch(self) -> int:
        order = self.fingerprint_at(self.seq_len)
        [samples] = self.count("samples", lambda: [self._count_samples()], order)
        return samples

    def _count_samples(self) -> int:
        walk, starts = self.walk(0), np.empty((COUNTED_STARTS, 2), self.start_dtype)
        samples = 0
        while not walk.at_end:
            samples += walk.fill(starts, DOCUMENTS_PER_CALL)
        return samples

    def index_sizes(self, ordinals: int) -> list[int]:
        """Return the size of the one epoch that an index for the ordinals [0, ordinals) stores."""
        return [self.samples_per_epoch] if ordinals else []

    def walk(self, epoch: int, like: _builder.StreamWalk | None = None) -> _builder.StreamWalk:
        """Return a walk through an epoch's samples in token order, the same for all epochs."""
        return super().walk(0, like)

    def in_token_order(self, ordinals: np.ndarray) -> np.ndarray:
        """Convert ordinals to sample numbers in token order, int64 [n]."""
        return self._shuffled(ordinals, max(1, self.samples_per_epoch))

    def index_rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the rows of the index that store where these samples begin, int64 [n]."""
        return numbers % self.samples_per_epoch

    def sample_pieces(
        self, starts: Starts, number: int, rest: PackedRemainder | None = None
    ) -> list[list[Piece]]:
        """Return the pieces of a sample, as one fragment; see Stream."""
        if rest is None:
            row = number % self.samples_per_epoch
            slot, offset = holding(starts, np.array([row]))[row].tolist()
            return [self.pieces(0, slot, offset)]
        start = self._starts_in(rest)[number : number + 1]
        return [self._samples.packed_pieces(rest.spans, start)]

    def _starts_in(self, rest: PackedRemainder) -> np.ndarray:
        return self._packed(rest)[0]

    def _packed(self, rest: PackedRemainder) -> tuple[np.ndarray, int]:
        self.verify_once()
        return rest.packed(self._samples, self.seq_len)

    def samples_left(self, rest: PackedRemainder) -> int:
        """Return the number of samples of this length in what is left of an epoch."""
        return len(self._starts_in(rest))

    def part_left(self, rest: PackedRemainder) -> Fraction:
        """Return what is left of an epoch, in epochs."""
        _, predictions = self._packed(rest)
        return Fraction(predictions, max(1, self.positions))

    def samples_within(self, epochs: Fraction) -> int:
        """Return the most samples of this length that are no more than a fraction of an epoch."""
        return int(epochs * self.samples_per_epoch)

    @property
    def positions(self) -> int:
        """The number of an epoch's tokens that are predicted from one of the same pair."""
        return self.tokens - self.documents

    def nothing_left(self, epoch: int = -1) -> PackedRemainder:
        """Return the remainder of an epoch that has been used up."""
        return PackedRemainder.nothing(epoch)

    def _whole(self, epoch: int) -> PackedRemainder:
        return PackedRemainder.whole(epoch, len(self.corpus.lengths))

    def _unused(self, rest: PackedRemainder, used: int) -> PackedRemainder:
        numbers = self.numbers_in(rest, np.arange(used))
        return rest.without(self._starts_in(rest), numbers)

    def _shuffled_in(self, rest: PackedRemainder, ordinals: np.ndarray, window: int) -> np.ndarray:
        return super()._shuffled_in(rest, ordinals, max(1, self.samples_left(rest)))

    def read_rest(
        self,
        starts: Starts,
        rest: PackedRemainder,
        numbers: np.ndarray,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        pad_token_id: int,
        documents: np.ndarray | None = None,
    ) -> None:
        """Read the samples with these numbers in a remainder; see Stream.read."""
        self._verified(
            self._samples.read_packed,
            rest.spans,
            self._starts_in(rest)[numbers],
            rows,
            inputs,
            targets,
            pad_token_id,
            IGNORED_TARGET,
            self._apart(documents),
        )

    def at(self, seq_len: int, grid: int | None = None) -> Self:
        """Return the stream of samples of another length; there is an index of its own for it."""
        return super().at(seq_len)

    def pieces(self, epoch: int, slot: int, offset: int) -> list[tuple[int, int, int]]:
        """Return (document, offset, tokens) of the pieces of the sample that begins there."""
        return super().pieces(0, slot, offset)
