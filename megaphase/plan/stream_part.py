"""A task's stream over changes of the samples' length: the samples that follow a position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megaphase.plan.document_stream import DocumentStream
from megaphase.plan.document_table import Piece
from megaphase.plan.stream import Starts, Stream


@dataclass(frozen=True)
class LocatedSample:
    """Where a sample of a task is.

    Attributes:
        epoch: epoch of the stream, from 0.
        number: index of the sample among the `of` samples of its length that the epoch has, or
            that were left of it when the phase changed the length; in token order, from 0.
        fragments: the pieces of each of its fragments: of consecutive tokens of the epoch, the
            first of which is no target.
    """

    epoch: int
    number: int
    of: int
    fragments: list[list[Piece]]


class StreamPart:
    """The samples of one kind that follow a position of a task's stream.

    First come those into which what is left of an epoch is cut, then those of whole epochs.
    """

    def __init__(self, stream: Stream, rest: Any, first_ordinal: int, starts: Starts) -> None:
        """
        Args:
            stream: of samples of this kind.
            rest: what is left of the epoch, as `stream.rest_after` returns it.
            first_ordinal: of the first sample of this kind after the position.
            starts: start_dtype [indexed samples, 2], the part of the index that `stream` reads.
        """
        self.stream, self.rest, self._starts = stream, rest, starts
        self._samples_in_rest = stream.samples_left(rest)
        self._first_ordinal = first_ordinal
        after_rest = first_ordinal + self._samples_in_rest
        self._shift = (rest.epoch + 1) * stream.samples_per_epoch - after_rest

    def open(self, samples: int) -> None:
        """Build the tables of packed documents that the first samples need, if they need any."""
        if isinstance(self.stream, DocumentStream):
            if self._samples_in_rest:
                self.stream.table(self.rest)
            if samples > self._samples_in_rest:
                self.stream.table()

    def _number_in_rest(self, ordinal: int) -> int:
        in_rest = np.array([ordinal - self._first_ordinal])
        return int(self.stream.numbers_in(self.rest, in_rest)[0])

    def locate(self, ordinal: int) -> LocatedSample:
        """Return where a sample is, and the documents that it consists of."""
        stream = self.stream
        if ordinal - self._first_ordinal < self._samples_in_rest:
            number, epoch = self._number_in_rest(ordinal), self.rest.epoch
            fragments = stream.sample_pieces(self._starts, number, self.rest)
            return LocatedSample(epoch, number, self._samples_in_rest, fragments)
        number = int(stream.in_token_order(np.array([ordinal + self._shift]))[0])
        fragments = stream.sample_pieces(self._starts, number)
        return LocatedSample(
            *divmod(number, stream.samples_per_epoch), stream.samples_per_epoch, fragments
        )

    def read(
        self,
        ordinals: np.ndarray,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        pad_token_id: int,
        documents: np.ndarray | None = None,
    ) -> None:
        """Read the samples with these ordinals into the given rows; see Stream.read.

        ordinals: int64 [samples]
        """
        stream, to = self.stream, (inputs, targets, pad_token_id, documents)
        if self._samples_in_rest:
            within = ordinals - self._first_ordinal
            in_rest = within < self._samples_in_rest
            if in_rest.any():
                numbers = stream.numbers_in(self.rest, within[in_rest])
                stream.read_rest(self._starts, self.rest, numbers, rows[in_rest], *to)
                ordinals, rows = ordinals[~in_rest], rows[~in_rest]
        if len(ordinals):
            if self._shift:
                ordinals = ordinals + self._shift
            stream.read(self._starts, stream.in_token_order(ordinals), rows, *to)
