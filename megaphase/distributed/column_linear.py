"""A linear layer whose weight's rows are sharded, and its way into the tensor-parallel region.

The input's gradient is summed over the ranks while the weight's gradient is computed (as in
Megatron-LM). With sequence parallelism the layer keeps its own part of the input alone; the whole
is gathered again while the input's gradient is computed (Korthikanti et al. 2022, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaphase.distributed.collectives import (
    Started,
    start_all_reduce,
    start_gather_sequence,
    start_reduce_scatter_sequence,
)
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.ops.matmul import linear, matmul, weight_gradient


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, grid: ProcessGrid, arriving: Started | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grid, ctx.sequence = grid, arriving is not None
        return matmul(x if arriving is None else arriving.finish(), weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        if not ctx.sequence:
            sum_ = start_all_reduce(matmul(grads[0], weight), ctx.grid)
            for_weight = weight_gradient(grads[0], x)
            return sum_.finish(), for_weight, None, None
        whole = start_gather_sequence(x, ctx.grid)
        for_whole = matmul(grads[0], weight)
        gathered = whole.finish()
        own = start_reduce_scatter_sequence(for_whole, ctx.grid)
        for_weight = weight_gradient(grads[0], gathered)
        return own.finish(), for_weight, None, None


def start_column_parallel_linear(
    x: Tensor, weight: Tensor, grid: ProcessGrid, sequence: bool
) -> Callable[[], Tensor]:
    """What computes x Wᵀ for x [batch, seq, inputs] and this rank's rows of W; [batch, seq, rows].

    sequence: whether x is this rank's part of the positions, [batch, seq / tensor, inputs]; the
        others' are on their way from now on.
    """
    if grid.tensor_size == 1:
        return partial(linear, x, weight)
    arriving = start_gather_sequence(x.detach(), grid) if sequence else None
    return partial(_ColumnParallelLinear.apply, x, weight, grid, arriving)
