"""The rest of an epoch of translation pairs that packed samples of one length have left.

Pairs are packed in the order of epoch 0, and what is left is a list of spans of it. It is packed
again for samples of the new length; only pairs that are longer than a sample are ever cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megaphase.plan import _builder


@dataclass(frozen=True)
class PackedRemainder:
    """The spans of an epoch that are left, in ascending order.

    Attributes:
        epoch, cuts: see Remainder.
        spans: int64 [spans, 4]: slot of a document and the token in it with which a span begins,
            and likewise where it ends; a token at which a document is cut belongs to both parts.
    """

    epoch: int
    cuts: int
    spans: np.ndarray
    _packed: dict[int, tuple[np.ndarray, int]] = field(default_factory=dict)

    @classmethod
    def nothing(cls, epoch: int) -> PackedRemainder:
        """Return the remainder of an epoch that has been used up."""
        return cls(epoch, 0, np.empty((0, 4), np.int64))

    @classmethod
    def whole(cls, epoch: int, documents: int) -> PackedRemainder:
        """Return all documents of an epoch."""
        return cls(epoch, 0, np.array([[0, 0, documents, 0]], np.int64))

    def packed(self, samples: _builder.Stream, seq_len: int) -> tuple[np.ndarray, int]:
        """Return the samples into which it is packed, and the number of predictions.

        samples: of this length.

        Returns [span, slot, token] with which each sample begins, int64 [samples, 3].
        """
        if seq_len not in self._packed:
            self._packed[seq_len] = samples.pack(self.spans)
        return self._packed[seq_len]

    def without(self, starts: np.ndarray, used: np.ndarray) -> PackedRemainder:
        """Return what is left when some samples have been used.

        starts: of all samples, as `packed` returns them. used: int64 [n], their numbers
        """
        begins = np.column_stack([np.arange(len(self.spans)), self.spans[:, :2]])
        # Parts that lie in one span and one sample, by [span, slot, token] of their start.
        parts, inverse = np.unique(np.concatenate([starts, begins]), axis=0, return_inverse=True)
        is_start = np.zeros(len(parts), np.int64)
        is_start[inverse.ravel()[: len(starts)]] = 1
        samples = np.maximum(np.cumsum(is_start) - 1, 0)
        ends = self.spans[parts[:, 0], 2:]
        in_one_span = parts[:-1, 0] == parts[1:, 0]
        ends[:-1][in_one_span] = parts[1:, 1:][in_one_span]
        kept = ~np.isin(samples, used)
        firsts, lasts = parts[kept, 1:], ends[kept]
        if len(firsts) == 0:
            return PackedRemainder.nothing(self.epoch)
        is_new = np.concatenate([[True], (firsts[1:] != lasts[:-1]).any(axis=1)])
        is_last = np.concatenate([is_new[1:], [True]])
        spans = np.concatenate([firsts[is_new], lasts[is_last]], axis=1)
        return PackedRemainder(self.epoch, self.cuts + 1, spans)
