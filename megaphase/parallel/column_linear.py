"""A linear layer whose weight's rows are sharded, and its way into the tensor-parallel region.

The input's gradient is summed over the ranks while the weight's gradient is computed (as in
Megatron-LM). With sequence parallelism the layer keeps its own part of the input alone; the whole
is gathered again while the input's gradient is computed (Korthikanti et al. 2022, section 4.2.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaphase.kernels.matmul import linear, matmul, weight_gradient
from megaphase.parallel.collectives import (
    start_all_reduce,
    start_gather_sequence,
    start_reduce_scatter_sequence,
)
from megaphase.parallel.topology import Topology


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, topology: Topology, sequence: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.topology, ctx.sequence = topology, sequence
        whole = start_gather_sequence(x, topology)() if sequence else x
        return matmul(whole, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        if not ctx.sequence:
            summed = start_all_reduce(matmul(grads[0], weight), ctx.topology)
            for_weight = weight_gradient(grads[0], x)
            return summed(), for_weight, None, None
        whole = start_gather_sequence(x, ctx.topology)
        for_whole = matmul(grads[0], weight)
        gathered = whole()
        own = start_reduce_scatter_sequence(for_whole, ctx.topology)
        for_weight = weight_gradient(grads[0], gathered)
        return own(), for_weight, None, None


def column_parallel_linear(x: Tensor, weight: Tensor, topology: Topology, sequence: bool) -> Tensor:
    """x Wᵀ for x [batch, seq, inputs] and this rank's rows of W; [batch, seq, rows].

    sequence: whether x is this rank's part of the positions, [batch, seq / tensor, inputs].
    """
    if topology.tensor_size == 1:
        return linear(x, weight)
    return _ColumnParallelLinear.apply(x, weight, topology, sequence)
