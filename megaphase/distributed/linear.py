"""Linear layers whose weights are sharded over the tensor-parallel group.

ColumnParallelLinear enters a region in which each rank holds some of the features, and
RowParallelLinear leaves it (Shoeybi et al. 2019, section 3). Weights are cast to the activations'
type when they are used, so fp32 masters may stay in place.

The gradient of the column-parallel layer's input is summed over the ranks while the weight's
gradient is computed (as in Megatron-LM). With sequence parallelism the layer saves only its own
part of the input, and gathers the whole again while the input's gradient is computed (Korthikanti
et al. 2022, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megaphase.distributed.collectives import (
    RunningCollective,
    start_all_reduce,
    start_gather_sequence,
    start_reduce_scatter_sequence,
)
from megaphase.distributed.costs import (
    BACKWARD_PRODUCTS,
    FP32_BYTES,
    Collective,
    CostedLayer,
    Rank,
    Work,
    enter_collectives,
    leave_collectives,
)
from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.parameter_spec import Constant, Normal, ParameterSpec, spec_of
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.ops.matmul import linear, matmul, weight_gradient
from megaphase.ops.recompute import saves_recompute_of
from megaphase.ops.row_order import sequence_first

# Gradients of a weight by two halves of a micro-batch: both are read, their sum is written.
_SUM_PASSES = 3


class _CostedLinear(CostedLayer):
    """The costs of a linear layer on one tensor-parallel rank."""

    weight: nn.Parameter
    hidden: int  # features outside of the tensor-parallel region

    def weights(self, rank: Rank) -> int:
        """Elements of the weight on one rank."""
        return spec_of(self.weight).layout(rank.tensor).shard_numel(rank.tensor)

    def flops_per_token(self, seq_len: int) -> int:
        return 2 * spec_of(self.weight).numel

    def forward_work(self, rank: Rank) -> Work:
        return Work(2 * rank.tokens * self.weights(rank))

    def backward_work(self, rank: Rank) -> Work:
        weights = self.weights(rank)
        sums = (rank.halves - 1) * _SUM_PASSES * weights * rank.compute_bytes
        return Work(2 * rank.tokens * weights * BACKWARD_PRODUCTS, 0, sums)

    def product_bytes(self, rank: Rank) -> int:
        """Bytes that the two products of the backward pass need beside the gradients of input and
        output: the weight's gradient, before it is added to that of earlier micro-batches."""
        weights = self.weights(rank)
        cast = weights * rank.compute_bytes if rank.compute_bytes != rank.parameter_bytes else 0
        widened = 0
        if rank.widened:  # the two factors and the result in fp32
            outputs = spec_of(self.weight).layout(rank.tensor).shard_shape(rank.tensor)[0]
            widened = FP32_BYTES * (rank.tokens * (outputs + weights // outputs) + weights)
        return weights * rank.parameter_bytes + cast + widened


class ColumnParallelLinear(_CostedLinear):
    """y = x Wᵀ + b with the rows of W [sum(segments), inputs] sharded, each segment separately.

    The input is as outside of the tensor-parallel region; output [..., sum(segments) / tensor].
    """

    def __init__(
        self,
        inputs: int,
        segments: tuple[int, ...],
        *,
        bias: bool,
        std: float,
        build: LayerBuilder,
    ) -> None:
        super().__init__()
        self.region = build.region
        self.hidden, outputs = inputs, sum(segments)
        weight = ParameterSpec(
            (outputs, inputs), Normal(std), dim=0, segments=segments, matrix=True
        )
        self.weight = build.parameter("weight", weight)
        self.bias = None
        if bias:
            spec = ParameterSpec(
                (outputs,), Constant(0.0), weight_decay=False, dim=0, segments=segments
            )
            self.bias = build.parameter("bias", spec)

    def forward(self, x: Tensor) -> Tensor:
        return self.start(x)()

    def start(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to gather x where it is sharded; the function returned waits for x and computes
        y."""
        region, weight = self.region, self.region.cast(self.weight, x.dtype)
        product = start_column_parallel_linear(x, weight, region.grid, region.sequence)

        def finish() -> Tensor:
            with saves_recompute_of(x):
                y = product()
            return y if self.bias is None else y + self.bias.to(x.dtype)

        return finish

    def forward_collectives(self, rank: Rank) -> Sequence[Collective]:
        return enter_collectives(rank, self.hidden)

    def backward_collectives(self, rank: Rank) -> Sequence[Collective]:
        return leave_collectives(rank, self.hidden)


class RowParallelLinear(_CostedLinear):
    """y = x Wᵀ + b with the columns of W [outputs, inputs] sharded.

    Input [..., inputs / tensor]; the ranks' partial results are summed on the way out.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        std: float,
        build: LayerBuilder,
    ) -> None:
        super().__init__()
        self.region = build.region
        self.hidden = outputs
        weight = ParameterSpec((outputs, inputs), Normal(std), dim=1, matrix=True)
        self.weight = build.parameter("weight", weight)
        self.bias = None
        if bias:
            spec = ParameterSpec((outputs,), Constant(0.0), weight_decay=False)
            self.bias = build.parameter("bias", spec)

    def forward(self, x: Tensor) -> Tensor:
        return self.start(x)()

    def start(self, x: Tensor) -> Callable[[], Tensor]:
        """Compute this rank's partial y and start to sum it; the function returned waits for y."""
        with saves_recompute_of(x):
            # Attention may have stored it otherwise, and the product would be larger to copy.
            x = sequence_first(x) if self.region.sequence else x
            product = linear(x, self.region.cast(self.weight, x.dtype))
        sum_ = self.region.reduce_async(product)
        return lambda: sum_() if self.bias is None else sum_() + self._whole_bias().to(x.dtype)

    def _whole_bias(self) -> Tensor:
        assert self.bias is not None
        return self.region.replicated(self.bias)

    def forward_collectives(self, rank: Rank) -> Sequence[Collective]:
        return leave_collectives(rank, self.hidden)

    def backward_collectives(self, rank: Rank) -> Sequence[Collective]:
        return enter_collectives(rank, self.hidden)


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, grid: ProcessGrid, arriving: RunningCollective | None
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
        grad = sequence_first(grads[0])
        for_whole = matmul(grad, weight)
        gathered = whole.finish()
        own = start_reduce_scatter_sequence(for_whole, ctx.grid)
        for_weight = weight_gradient(grad, gathered)
        return own.finish(), for_weight, None, None


def start_column_parallel_linear(
    x: Tensor, weight: Tensor, grid: ProcessGrid, sequence: bool
) -> Callable[[], Tensor]:
    """Returns a function that computes x Wᵀ for x [batch, seq, inputs] and this rank's rows of W;
    [batch, seq, rows].

    sequence: whether x is this rank's part of the positions, [batch, seq / tensor, inputs]; those
        of the other ranks are being gathered from now on.
    """
    if grid.tensor_size == 1:
        return partial(linear, x, weight)
    arriving = start_gather_sequence(x.detach(), grid) if sequence else None
    return partial(_ColumnParallelLinear.apply, x, weight, grid, arriving)
