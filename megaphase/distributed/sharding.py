"""How one parameter is cut among tensor-parallel ranks, and put together again.

torch is not imported: the memory estimate of `megaphase plan` must not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ParameterLayout:
    """A whole parameter and the cut that tensor parallelism makes through it.

    Attributes:
        shape: of the whole parameter, without rows that only pad.
        dim: along which it is cut; None where every rank holds all of it.
        segments: sizes along `dim` of the parts that are cut one by one (query, key and value,
            say), padding included; empty where dim is None.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the whole parameter, without those that only pad."""
        return math.prod(self.shape)

    def padded_shape(self) -> tuple[int, ...]:
        """Of the whole parameter with the rows that only pad."""
        if self.dim is None:
            return self.shape
        return tuple(sum(self.segments) if i == self.dim else n for i, n in enumerate(self.shape))

    def shard_shape(self, size: int) -> tuple[int, ...]:
        """Of one of `size` ranks' parts."""
        padded = self.padded_shape()
        return tuple(n // size if i == self.dim else n for i, n in enumerate(padded))

    def shard_numel(self, size: int) -> int:
        """Elements of one of `size` ranks' parts."""
        return math.prod(self.shard_shape(size))

    def cut(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """One rank's part of the whole parameter, contiguous: its slice of every segment, joined.

        Rows that only pad are zero.
        """
        if self.is_whole(size) or self.dim is None:
            return whole.contiguous()
        part = whole.new_zeros(self.shard_shape(size))
        for run in self.runs(rank, size):
            run.of_part(part, self.dim).copy_(run.of_whole(whole, self.dim))
        return part

    def join(self, parts: Iterable[Tensor], size: int) -> Tensor:
        """The whole parameter, without padding, from the parts of all `size` ranks in order.

        A part is no longer needed when the next is asked for.
        """
        whole = None
        for rank, part in enumerate(parts):
            if self.is_whole(size) or self.dim is None:
                return part
            if whole is None:
                whole = part.new_empty(self.shape)
            for run in self.runs(rank, size):
                run.of_whole(whole, self.dim).copy_(run.of_part(part, self.dim))
        assert whole is not None
        return whole

    def flat_cut(self, whole: Tensor, rank: int, size: int) -> list[Tensor]:
        """`cut`, flattened, as tensors [elements] that follow each other; without a copy where
        rows are cut, or nothing."""
        if self.dim != 0 or self.is_whole(size):
            return [self.cut(whole, rank, size).view(-1)]
        parts = [run.of_whole(whole, 0).view(-1) for run in self.runs(rank, size)]
        padding = self.shard_numel(size) - sum(part.numel() for part in parts)
        return [*parts, whole.new_zeros(padding)] if padding else parts

    def is_whole(self, size: int) -> bool:
        """Whether one of `size` ranks' parts is the whole parameter, without padding."""
        return self.dim is None or (size == 1 and self.padded_shape() == self.shape)

    def runs(self, rank: int, size: int) -> Iterator[Run]:
        """Where a rank's slice of every segment lies, without what only pads."""
        assert self.dim is not None
        segment_start = in_part = 0
        for segment in self.segments:
            length = segment // size
            in_whole = segment_start + rank * length
            real = min(length, self.shape[self.dim] - in_whole)
            if real > 0:
                yield Run(in_whole, in_part, real)
            segment_start, in_part = segment_start + segment, in_part + length


@dataclass(frozen=True)
class Run:
    """A slice of a whole parameter that lies in one rank's part."""

    in_whole: int
    in_part: int
    length: int

    def of_whole(self, whole: Tensor, dim: int) -> Tensor:
        return whole.narrow(dim, self.in_whole, self.length)

    def of_part(self, part: Tensor, dim: int) -> Tensor:
        return part.narrow(dim, self.in_part, self.length)


def vocab_rows(vocab: int, tensor_size: int) -> int:
    """Rows of the vocabulary on each rank; the last ones may only pad."""
    return -(-vocab // tensor_size)


def padded_vocab(vocab: int, tensor_size: int) -> int:
    """The vocabulary rounded up so that every rank holds equally many rows."""
    return vocab_rows(vocab, tensor_size) * tensor_size


def layout_of(parameter: Tensor) -> ParameterLayout:
    """How a parameter of the model was cut; its own shape may be that of a ZeRO-3 partition."""
    layout = getattr(parameter, "parallel_layout", None)
    if isinstance(layout, ParameterLayout):
        return layout
    return ParameterLayout(tuple(getattr(parameter, "ds_shape", parameter.shape)))
