"""How one parameter is sharded over tensor-parallel ranks, and put together again.

torch is not imported.
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
    """A whole parameter and how tensor parallelism shards it.

    Attributes:
        shape: of the whole parameter, without padding.
        dim: along which it is sharded; None where every rank holds all of it.
        segments: sizes along `dim` of the parts that are sharded separately (query, key and
            value, say), padding included; empty where dim is None.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the whole parameter, without padding."""
        return math.prod(self.shape)

    def padded_shape(self) -> tuple[int, ...]:
        """Of the whole parameter with padding."""
        if self.dim is None:
            return self.shape
        return tuple(sum(self.segments) if i == self.dim else n for i, n in enumerate(self.shape))

    def shard_shape(self, size: int) -> tuple[int, ...]:
        """Of the shard of one of `size` ranks."""
        padded = self.padded_shape()
        return tuple(n // size if i == self.dim else n for i, n in enumerate(padded))

    def shard_numel(self, size: int) -> int:
        """Elements of the shard of one of `size` ranks."""
        return math.prod(self.shard_shape(size))

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """One rank's shard, contiguous: its slice of every segment, concatenated.

        Padding is zero.
        """
        if self.is_whole(size) or self.dim is None:
            return whole.contiguous()
        shard = whole.new_zeros(self.shard_shape(size))
        for run in self.runs(rank, size):
            run.of_shard(shard, self.dim).copy_(run.of_whole(whole, self.dim))
        return shard

    def unshard(self, shards: Iterable[Tensor], size: int) -> Tensor:
        """The whole parameter, without padding, from the shards of all `size` ranks in order.

        A shard is no longer needed when the next one is requested.
        """
        whole = None
        for rank, shard in enumerate(shards):
            if self.is_whole(size) or self.dim is None:
                return shard
            if whole is None:
                whole = shard.new_empty(self.shape)
            for run in self.runs(rank, size):
                run.of_whole(whole, self.dim).copy_(run.of_shard(shard, self.dim))
        assert whole is not None
        return whole

    def flat_shard(self, whole: Tensor, rank: int, size: int) -> list[Tensor]:
        """`shard`, flattened, as consecutive tensors [elements]; without a copy where rows are
        sharded, or nothing is."""
        if self.dim != 0 or self.is_whole(size):
            return [self.shard(whole, rank, size).view(-1)]
        parts = [run.of_whole(whole, 0).view(-1) for run in self.runs(rank, size)]
        padding = self.shard_numel(size) - sum(part.numel() for part in parts)
        return [*parts, whole.new_zeros(padding)] if padding else parts

    def is_whole(self, size: int) -> bool:
        """Whether the shard of one of `size` ranks is the whole parameter, without padding."""
        return self.dim is None or (size == 1 and self.padded_shape() == self.shape)

    def runs(self, rank: int, size: int) -> Iterator[Run]:
        """Where a rank's slice of every segment lies, without padding."""
        assert self.dim is not None
        segment_start = in_shard = 0
        for segment in self.segments:
            length = segment // size
            in_whole = segment_start + rank * length
            real = min(length, self.shape[self.dim] - in_whole)
            if real > 0:
                yield Run(in_whole, in_shard, real)
            segment_start, in_shard = segment_start + segment, in_shard + length


@dataclass(frozen=True)
class Run:
    """A slice of a whole parameter that lies in one rank's shard."""

    in_whole: int
    in_shard: int
    length: int

    def of_whole(self, whole: Tensor, dim: int) -> Tensor:
        return whole.narrow(dim, self.in_whole, self.length)

    def of_shard(self, shard: Tensor, dim: int) -> Tensor:
        return shard.narrow(dim, self.in_shard, self.length)


def vocab_rows(vocab: int, tensor_size: int) -> int:
    """Rows of the vocabulary on each rank; the last ones may be padding."""
    return -(-vocab // tensor_size)


def padded_vocab(vocab: int, tensor_size: int) -> int:
    """The vocabulary rounded up so that every rank holds equally many rows."""
    return vocab_rows(vocab, tensor_size) * tensor_size


def layout_of(parameter: Tensor) -> ParameterLayout:
    """How a parameter of the model is sharded; its own shape may be that of a ZeRO-3 partition."""
    layout = getattr(parameter, "parallel_layout", None)
    if isinstance(layout, ParameterLayout):
        return layout
    return ParameterLayout(tuple(getattr(parameter, "ds_shape", parameter.shape)))
