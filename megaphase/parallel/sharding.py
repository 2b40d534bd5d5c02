"""How one parameter is cut among tensor-parallel ranks, and put together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
        """One rank's part of the whole parameter, which may lack the rows that only pad."""
        if self.dim is None:
            return whole
        missing = sum(self.segments) - whole.shape[self.dim]
        if missing:
            after = whole.ndim - 1 - self.dim
            whole = torch.nn.functional.pad(whole, (0, 0) * after + (0, missing))
        return shard(whole, self.dim, self.segments, rank, size)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole parameter, without padding, from the parts of all ranks in order."""
        if self.dim is None:
            return parts[0]
        by_rank = [part.split([n // len(parts) for n in self.segments], self.dim) for part in parts]
        in_order = [piece for segment in zip(*by_rank, strict=True) for piece in segment]
        return torch.cat(in_order, self.dim).narrow(self.dim, 0, self.shape[self.dim])


def shard(whole: Tensor, dim: int, segments: Sequence[int], rank: int, size: int) -> Tensor:
    """One rank's part of a parameter: its slice of every segment along `dim`, joined."""
    parts = [part.chunk(size, dim)[rank] for part in whole.split(list(segments), dim)]
    return torch.cat(parts, dim).contiguous()


def layout_of(parameter: Tensor) -> ParameterLayout:
    """How a parameter of the model was cut; its own shape may be that of a ZeRO-3 partition."""
    layout = getattr(parameter, "parallel_layout", None)
    if isinstance(layout, ParameterLayout):
        return layout
    return ParameterLayout(tuple(getattr(parameter, "ds_shape", parameter.shape)))
