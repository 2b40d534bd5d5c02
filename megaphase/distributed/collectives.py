"""Collectives over the tensor-parallel group that autograd can differentiate.

Each is the transpose of another one, as in Megatron-LM (Shoeybi et al. 2019, section 3; Korthikanti
et al. 2022 for the sequence-parallel pair). Activations are [batch, seq, hidden]; what is gathered
or scattered along the sequence is stored sequence first (`ops.row_order`), where the ranks' parts
lie one after the other, and is copied only where its storage is another one.
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
class RunningCollective:
    """A running collective.

    result: not to be read before `finish`.
    """

    work: dist.Work
    result: Tensor

    def finish(self) -> Tensor:
        """Wait for the collective and return its result."""
        self.work.wait()
        return self.result


def start_all_reduce(x: Tensor, grid: ProcessGrid) -> RunningCollective:
    """Sum over the group, in place if x is contiguous; x must not be used afterwards."""
    x = x.contiguous()
    work = dist.all_reduce(x, group=grid.tensor_group, async_op=True)
    return RunningCollective(work, x)


def start_gather_sequence(x: Tensor, grid: ProcessGrid) -> RunningCollective:
    """[batch, seq / tensor, hidden] -> [batch, seq, hidden], stored sequence first."""
    own = x.transpose(0, SEQUENCE_DIM).contiguous()
    whole = own.new_empty(len(own) * grid.tensor_size, *own.shape[1:])
    work = dist.all_gather_into_tensor(whole, own, group=grid.tensor_group, async_op=True)
    return RunningCollective(work, whole.transpose(0, SEQUENCE_DIM))


def start_reduce_scatter_sequence(x: Tensor, grid: ProcessGrid) -> RunningCollective:
    """Sum [batch, seq, hidden] over the group; return this rank's [batch, seq / tensor, hidden],
    stored sequence first."""
    whole = x.transpose(0, SEQUENCE_DIM).contiguous()
    own = whole.new_empty(len(whole) // grid.tensor_size, *whole.shape[1:])
    work = dist.reduce_scatter_tensor(own, whole, group=grid.tensor_group, async_op=True)
    return RunningCollective(work, own.transpose(0, SEQUENCE_DIM))


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
class _Reduction:
    """A reduction that leaves the tensor-parallel region, and its gradient's gather in backward."""

    grid: ProcessGrid
    sequence: bool
    out: RunningCollective | None = None
    back: RunningCollective | None = None


class _StartReduction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, reduction: _Reduction) -> Tensor:
        ctx.reduction = reduction
        if reduction.sequence:
            reduction.out = start_reduce_scatter_sequence(x, reduction.grid)
            return reduction.out.result
        ctx.mark_dirty(x)
        reduction.out = start_all_reduce(x, reduction.grid)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # The graph is released only when the next micro-batch has its own: the gathered gradients
        # of all layers would stay in memory during its forward pass.
        back, ctx.reduction.back = ctx.reduction.back, None
        return grads[0] if back is None else back.finish(), None


class _FinishReduction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, reduction: _Reduction) -> Tensor:
        ctx.reduction = reduction
        assert reduction.out is not None
        reduction.out.finish()
        reduction.out = None
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        reduction = ctx.reduction
        if reduction.sequence:
            reduction.back = start_gather_sequence(grads[0], reduction.grid)
        return grads[0], None


def copy_to_tensor_parallel(xs: Sequence[Tensor], grid: ProcessGrid) -> Sequence[Tensor]:
    """Identity in forward; in backward, one sum of all gradients over the tensor-parallel group.

    xs: of one dtype.
    """
    if grid.tensor_size == 1 or not xs:
        return xs
    copies: Sequence[Tensor] = _CopyToTensorParallel.apply(grid, *xs)
    return copies


def gather_sequence(x: Tensor, grid: ProcessGrid) -> Tensor:
    """[batch, seq / tensor, hidden] -> [batch, seq, hidden]; backward reduces and scatters."""
    gathered: Tensor = _GatherSequence.apply(x, grid)
    return gathered


def reduce_async(x: Tensor, grid: ProcessGrid, sequence: bool) -> Callable[[], Tensor]:
    """Start to sum x over the tensor-parallel group; the returned function waits for the sum.

    Work between the two calls, in forward and in backward, overlaps with the collective.

    x: [batch, seq, hidden], contiguous or, with `sequence`, stored sequence first; must not be used
        afterwards.
    sequence: whether every rank keeps only its positions, [batch, seq / tensor, hidden]; in
        backward they are gathered.
    """
    if grid.tensor_size == 1:
        return lambda: x
    reduction = _Reduction(grid, sequence)
    sum_ = _StartReduction.apply(x, reduction)
    return lambda: _FinishReduction.apply(sum_, reduction)
