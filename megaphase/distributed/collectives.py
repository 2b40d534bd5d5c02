"""Collectives over the tensor-parallel group that autograd can differentiate.

Each is the transpose of another, as in Megatron-LM (Shoeybi et al. 2019, section 3; Korthikanti
et al. 2022 for the sequence-parallel pair). Activations are [batch, seq, hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaphase.distributed.process_grid import ProcessGrid

SEQUENCE_DIM = 1


@dataclass(frozen=True)
class Started:
    """A collective under way.

    parts: its result along the sequence, not to be read before it has been finished.
    """

    work: dist.Work
    parts: list[Tensor]

    def finish(self) -> Tensor:
        """Wait for it; its result."""
        self.work.wait()
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=SEQUENCE_DIM)


def start_all_reduce(x: Tensor, grid: ProcessGrid) -> Started:
    """Sum over the group, in place where x is contiguous; x is used up."""
    x = x.contiguous()
    work = dist.all_reduce(x, group=grid.tensor_group, async_op=True)
    return Started(work, [x])


def start_gather_sequence(x: Tensor, grid: ProcessGrid) -> Started:
    """[batch, seq / tensor, hidden] -> [batch, seq, hidden]."""
    parts = [torch.empty_like(x) for _ in range(grid.tensor_size)]
    work = dist.all_gather(parts, x.contiguous(), group=grid.tensor_group, async_op=True)
    return Started(work, parts)


def start_reduce_scatter_sequence(x: Tensor, grid: ProcessGrid) -> Started:
    """Sum [batch, seq, hidden] and keep one's own [batch, seq / tensor, hidden]."""
    parts = [part.contiguous() for part in x.chunk(grid.tensor_size, dim=SEQUENCE_DIM)]
    own = torch.empty_like(parts[0])
    work = dist.reduce_scatter(own, parts, group=grid.tensor_group, async_op=True)
    return Started(work, [own])


class _CopyToTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grid: ProcessGrid, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.grid = grid
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        joined = torch.cat([grad.flatten() for grad in grads])
        sums = start_all_reduce(joined, ctx.grid).finish().split([x.numel() for x in grads])
        return None, *(sum_.view(x.shape) for sum_, x in zip(sums, grads, strict=True))


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ProcessGrid) -> Tensor:
        ctx.grid = grid
        return start_gather_sequence(x, grid).finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_reduce_scatter_sequence(grads[0], ctx.grid).finish(), None


@dataclass
class _Crossing:
    """What is under way out of the region, and its gradient on the way back."""

    grid: ProcessGrid
    sequence: bool
    out: Started | None = None
    back: Started | None = None


class _StartLeaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        if crossing.sequence:
            crossing.out = start_reduce_scatter_sequence(x, crossing.grid)
            return crossing.out.parts[0]
        ctx.mark_dirty(x)
        crossing.out = start_all_reduce(x, crossing.grid)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        back = ctx.crossing.back
        return grads[0] if back is None else back.finish(), None


class _FinishLeaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        assert crossing.out is not None
        crossing.out.finish()
        crossing.out = None
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        crossing = ctx.crossing
        if crossing.sequence:
            crossing.back = start_gather_sequence(grads[0], crossing.grid)
        return grads[0], None


def copy_to_tensor_parallel(xs: Sequence[Tensor], grid: ProcessGrid) -> Sequence[Tensor]:
    """Identity forward; backward one sum over the tensor-parallel group, of all gradients.

    xs: of one type.
    """
    if grid.tensor_size == 1 or not xs:
        return xs
    copies: Sequence[Tensor] = _CopyToTensorParallel.apply(grid, *xs)
    return copies


def gather_sequence(x: Tensor, grid: ProcessGrid) -> Tensor:
    """[batch, seq / tensor, hidden] -> [batch, seq, hidden]; backward sums and scatters."""
    gathered: Tensor = _GatherSequence.apply(x, grid)
    return gathered


def reduce_async(x: Tensor, grid: ProcessGrid, sequence: bool) -> Callable[[], Tensor]:
    """Start to sum x over the tensor-parallel group; what is returned waits for the sum.

    What is computed in between, forward and backward, is computed while the collective goes on.

    x: [batch, seq, hidden], contiguous; it is used up.
    sequence: whether every rank keeps its positions alone, [batch, seq / tensor, hidden]; backward
        they are gathered.
    """
    if grid.tensor_size == 1:
        return lambda: x
    crossing = _Crossing(grid, sequence)
    sum_ = _StartLeaving.apply(x, crossing)
    return lambda: _FinishLeaving.apply(sum_, crossing)
