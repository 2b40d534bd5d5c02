"""A task's stream over changes of its samples' length, and the index that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.plan import _builder
from megaphase.plan import stream as texts
from megaphase.plan.document_stream import DocumentStream
from megaphase.plan.mixture import TaskSupply
from megaphase.plan.packed_stream import PackedStream
from megaphase.plan.position import SampleKind, StreamPosition
from megaphase.plan.stream import Starts, Stream
from megaphase.plan.stream_part import StreamPart
from megaphase.plan.verified_file import part


class TaskStream:
    """A task's stream whose samples may have another length in every phase.

    Its index has a start every `grid` tokens, the smallest length of a phase, for all lengths.
    """

    def __init__(self, stream: Stream, kinds: Sequence[SampleKind]) -> None:
        """
        Args:
            stream: of samples of any length.
            kinds: of the samples of each phase.
        """
        self._stream = stream
        self._kinds = list(dict.fromkeys(self.kind_of(kind) for kind in kinds))
        even = [kind.seq_len for kind in self._kinds if kind.cut == "tokens"]
        self._grid = min(even or [kind.seq_len for kind in kinds])
        self._of_documents: dict[int, DocumentStream] = {}
        self._rests = {StreamPosition(): stream.nothing_left()}

    @property
    def start_dtype(self) -> type[np.generic]:
        """The type of the index's slots and offsets."""
        return self._stream.start_dtype

    @property
    def prefix(self) -> Path:
        """The prefix of its corpus."""
        return self._stream.corpus.prefix

    @staticmethod
    def of(stream: Stream, kinds: Sequence[SampleKind]) -> TaskStream:
        """Return the stream of a task of texts or of translation pairs."""
        cls = PackedTaskStream if isinstance(stream, PackedStream) else TaskStream
        return cls(stream, kinds)

    def kind_of(self, kind: SampleKind) -> SampleKind:
        """Return the kind that this task's samples have in a phase with samples of a kind."""
        return kind

    def at(self, kind: SampleKind) -> Stream:
        """Return the stream of samples of one kind, which reads from this task's index."""
        kind = self.kind_of(kind)
        if kind.cut == "documents":
            if kind.seq_len not in self._of_documents:
                self._of_documents[kind.seq_len] = DocumentStream.of(self._stream, kind.seq_len)
            return self._of_documents[kind.seq_len]
        return self._stream.at(kind.seq_len, self._grid)

    def rest(self, position: StreamPosition) -> Any:
        """Return what is left of the epoch that a position is in."""
        if position not in self._rests:
            *before, (kind, samples) = position.segments
            rest = self.rest(StreamPosition(tuple(before)))
            self._rests[position] = self.at(kind).rest_after(rest, samples)
        return self._rests[position]

    def part(self, position: StreamPosition, kind: SampleKind, starts: Starts) -> StreamPart:
        """Return the samples of a kind from a position on; `starts`: the task's index."""
        start = position.start_of(self.kind_of(kind))
        return StreamPart(self.at(kind), self.rest(start), start.samples, starts)

    def epochs(self, position: StreamPosition) -> Fraction:
        """Return how many epochs have been used up to a position, by positions of the corpus."""
        rest = self.rest(position)
        used: Fraction = rest.epoch + 1 - self._stream.part_left(rest)
        return used

    def supply(self, kind: SampleKind, position: StreamPosition) -> TaskSupply:
        """Return the supply of samples of a kind after a position."""
        stream = self.at(kind)
        kind = self.kind_of(kind)
        until = None if position.is_plain(kind) else partial(self._samples_until, position, kind)
        return TaskSupply(stream.tokens, stream.samples_per_epoch, position.samples, until)

    def _samples_until(self, position: StreamPosition, kind: SampleKind, epochs: Fraction) -> int:
        """Return the samples of a kind from a position until `epochs` epochs have been used."""
        stream, rest = self.at(kind), self.rest(position)
        if rest.epoch < int(epochs):
            after_rest: Fraction = epochs - (rest.epoch + 1)
            return stream.samples_left(rest) + int(after_rest * stream.samples_per_epoch)
        left = epochs - self.epochs(position)
        return stream.samples_within(left) if left > 0 else 0

    def index_sizes(self, first: StreamPosition, last: StreamPosition) -> list[int]:
        """Return, for every epoch, the starts that an index of the samples between two positions
        has; also those before the first one, which are not written."""
        if first == last:
            return []
        [kind, *others] = self._kinds
        if not others and last.is_plain(kind):
            return self.at(kind).index_sizes(last.samples)
        last = self._last_on_grid(last)
        if not last.segments:
            return []
        if any(kind.cut == "documents" for kind, _ in last.segments):
            # Where samples are cut at documents, an epoch that they have begun needs no index, but
            # which epochs those are changes with phases that end early. Samples are then packed
            # from other parts, and may be fuller than planned, so count the most that they can
            # take: without BOS, also the first token of a document that begins a sample.
            most = sum(n * (kind.seq_len + (kind.cut == "documents")) for kind, n in last.segments)
            epochs = -(-most // max(1, self._on_grid.positions))
            return [self._on_grid.samples_per_epoch] * epochs
        # A phase that ends early leaves more of an epoch to the next one, and may thereby have it
        # change the length in an earlier one: wherever that is, it reads at most one window beyond
        # as many positions as the plan uses of the epoch.
        window = texts.SAMPLE_WINDOW * max(kind.seq_len for kind in self._kinds)
        return self._on_grid.index_sizes_until(self.rest(last), window)

    def first_indexed_epoch(self, first: StreamPosition) -> int:
        """Return the first epoch that an index for the samples after a position needs."""
        rest, stream = self.rest(first), self._on_grid
        epoch: int = rest.epoch
        return epoch if stream.samples_left(rest) else epoch + 1

    def walk(self, epoch: int, like: _builder.StreamWalk | None = None) -> _builder.StreamWalk:
        """Return a walk through the starts of an epoch in the index; like: see `Stream.walk`."""
        return self._on_grid.walk(epoch, like)

    def _last_on_grid(self, position: StreamPosition) -> StreamPosition:
        """Return the last position up to this one at which samples were cut every seq_len
        tokens."""
        segments = position.segments
        while segments and segments[-1].kind.cut == "documents":
            segments = segments[:-1]
        return StreamPosition(segments)

    @property
    def _on_grid(self) -> Stream:
        return self.at(SampleKind(self._grid))


class PackedTaskStream(TaskStream):
    """Likewise of translation pairs, of which the index stores one epoch for each length.

    They are packed whatever a phase's `cut` is.
    """

    def kind_of(self, kind: SampleKind) -> SampleKind:
        """Return the kind of the same length that pairs have."""
        return SampleKind(kind.seq_len)

    def index_sizes(self, first: StreamPosition, last: StreamPosition) -> list[int]:
        """Return the samples of an epoch for each length; nothing if no sample is used."""
        return [] if first == last else [self.at(k).samples_per_epoch for k in self._kinds]

    def walk(self, epoch: int, like: _builder.StreamWalk | None = None) -> _builder.StreamWalk:
        """Return a walk through the starts of the samples of one of the lengths."""
        return self.at(self._kinds[epoch]).walk(0, like)

    def part(self, position: StreamPosition, kind: SampleKind, starts: Starts) -> StreamPart:
        """Return the samples of a kind from a position on; `starts`: the task's index."""
        before = self._kinds[: self._kinds.index(self.kind_of(kind))]
        first = sum(self.at(each).samples_per_epoch for each in before)
        own = part(starts, first, first + self.at(kind).samples_per_epoch)
        return super().part(position, kind, own)

    def first_indexed_epoch(self, first: StreamPosition) -> int:
        """Return 0: all epochs need those that the index stores."""
        return 0
