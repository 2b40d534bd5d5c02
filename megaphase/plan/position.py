"""A position in a task's stream: how many samples of which length have been used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

Cut = Literal["tokens", "documents"]


class SampleKind(NamedTuple):
    """How a stream is cut into samples.

    Attributes:
        seq_len: tokens of a sample, without the one that it shares with its neighbour.
        cut: `tokens`: every seq_len tokens; `documents`: where documents begin.
    """

    seq_len: int
    cut: Cut = "tokens"


class Segment(NamedTuple):
    """Consecutive samples of one kind."""

    kind: SampleKind
    samples: int


@dataclass(frozen=True)
class StreamPosition:
    """The segments of a stream that have been used, from the start of the run on.

    Positions that mean the same are equal: no segment is empty, and no two neighbours are of the
    same kind.
    """

    segments: tuple[Segment, ...] = ()

    @property
    def samples(self) -> int:
        """The ordinal of the next sample: the samples that have been used, whatever their kind."""
        return sum(segment.samples for segment in self.segments)

    @property
    def tokens(self) -> int:
        """The tokens of these samples; a sample counts seq_len tokens, however full it is."""
        return sum(segment.samples * segment.kind.seq_len for segment in self.segments)

    def after(self, kind: SampleKind, samples: int) -> Self:
        """Return the position when `samples` samples of a kind have been used as well."""
        if samples < 0:
            raise ValueError(f"{samples} samples cannot be used")
        if samples == 0:
            return self
        before, last = self._split_at_last(kind)
        return type(self)((*before.segments, Segment(kind, last + samples)))

    def start_of(self, kind: SampleKind) -> Self:
        """Return where the samples of this kind begin that end here; itself if there are none."""
        return self._split_at_last(kind)[0]

    def _split_at_last(self, kind: SampleKind) -> tuple[Self, int]:
        if self.segments and self.segments[-1].kind == kind:
            return type(self)(self.segments[:-1]), self.segments[-1].samples
        return self, 0

    def is_plain(self, kind: SampleKind) -> bool:
        """Return whether all samples are of this kind, so that their number says everything."""
        return all(segment.kind == kind for segment in self.segments)

    def to_json(self, kind: SampleKind | None = None) -> int | list[list[Any]]:
        """Return it as [seq_len, cut, samples] of every segment, or as a number if all samples are
        of this kind."""
        if kind is not None and self.is_plain(kind):
            return self.samples
        return [[*segment.kind, segment.samples] for segment in self.segments]

    @classmethod
    def from_json(
        cls, value: int | Sequence[Sequence[Any]], kind: SampleKind | None = None
    ) -> Self:
        """Return the position from the result of `to_json`.

        Raises TypeError or ValueError if it is not one.
        """
        position = cls()
        if type(value) is int and kind is not None:
            return position.after(kind, value)
        if not isinstance(value, list):
            raise TypeError("a position is a list of segments")
        for seq_len, cut, samples in value:
            if type(seq_len) is not int or type(samples) is not int:
                raise TypeError("a count is no integer")
            if seq_len < 1 or cut not in ("tokens", "documents"):
                raise ValueError("a segment has no length")
            position = position.after(SampleKind(seq_len, cut), samples)
        return position
