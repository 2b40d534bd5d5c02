"""Norms over the hidden dimension.

Each adds a layer's output to the residual stream and normalizes the sum, in one kernel where there
is one, and returns both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from megaphase.distributed.costs import (
    FP32_BYTES,
    BackwardStage,
    CostedLayer,
    Rank,
    Work,
    residual_bytes,
)
from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.parameter_spec import Constant, ParameterSpec
from megaphase.ops.layer_norm import layer_norm
from megaphase.ops.recompute import recomputable
from megaphase.ops.rms_norm import add_and_rms_norm, rms_norm
from megaphase.ops.row_order import stored_order

# Passes over the residual stream: it and what is added are read, the sum and the normalized sum
# written; backward, both gradients and the sum are read and one gradient written. To recompute the
# normalized sum, the sum is read and it is written. Where nothing is added, there is no sum.
_FORWARD_PASSES, _BACKWARD_PASSES, _RECOMPUTE_PASSES = 4, 4, 2
_ALONE_FORWARD, _ALONE_BACKWARD = 2, 3


class _Norm(CostedLayer):
    """The scale and the costs that norms share. statistics: fp32 values saved for each token."""

    statistics: int

    def __init__(
        self,
        hidden: int,
        eps: float,
        build: LayerBuilder,
        *,
        recomputed: bool = False,
        adds: bool = True,
        zero_centered: bool = False,
        shares_input: bool = False,
    ) -> None:
        """recomputed: whether the linear layer that follows saves no copy of the output. adds:
        whether something is added before. zero_centered: multiply by 1 + weight. shares_input:
        whether another norm has the same input.
        """
        super().__init__()
        self.region, self.eps, self.kernels = build.region, eps, build.kernels
        self.hidden, self.recomputed, self.adds = hidden, recomputed, adds
        self.zero_centered, self.shares_input = zero_centered, shares_input
        start = Constant(0.0 if zero_centered else 1.0)
        weight = ParameterSpec((hidden,), start, weight_decay=False)
        self.weight = build.parameter("weight", weight)

    def forward_work(self, rank: Rank) -> Work:
        passes = _FORWARD_PASSES if self.adds else _ALONE_FORWARD
        return Work(0, 0, passes * residual_bytes(rank, self.hidden))

    def backward_work(self, rank: Rank) -> Work:
        passes = _BACKWARD_PASSES if self.adds else _ALONE_BACKWARD
        return Work(0, 0, passes * residual_bytes(rank, self.hidden))

    def recomputed_work(self, rank: Rank) -> Work:
        passes = _RECOMPUTE_PASSES if self.recomputed else 0
        return Work(0, 0, passes * residual_bytes(rank, self.hidden))

    def saved(self, rank: Rank) -> Mapping[str, int]:
        """Without the output, which the layer that follows saves."""
        statistics = rank.outer_tokens * self.statistics * FP32_BYTES
        input_ = 0 if self.shares_input else residual_bytes(rank, self.hidden)
        return {"input": input_, "statistics": statistics}

    def backward_stages(self, rank: Rank) -> Sequence[BackwardStage]:
        transient = 3 * residual_bytes(rank, self.hidden) + self.uncompiled_bytes(rank)
        return (BackwardStage(transient, released=sum(self.saved(rank).values())),)

    def uncompiled_bytes(self, rank: Rank) -> int:
        """Bytes that the backward pass needs in addition where each operation is a kernel of its
        own."""
        return 0


class RMSNorm(_Norm):
    """Root-mean-square norm (Zhang and Sennrich 2019)."""

    statistics = 1  # the scale

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + added, and that normalized."""
        weight, order = self.region.replicated(self.weight), stored_order(x)
        added = added if added is None else order(added).contiguous()
        settings = (self.eps, self.kernels, self.zero_centered)
        total, normed = add_and_rms_norm(order(x), added, weight, *settings)
        again = partial(rms_norm, total.detach(), self.weight, *settings)
        total, normed = order(total), order(normed)
        return total, recomputable(normed, again) if self.recomputed else normed

    def uncompiled_bytes(self, rank: Rank) -> int:
        return 0 if rank.compiled else 4 * rank.outer_tokens * self.hidden * FP32_BYTES


class LayerNorm(_Norm):
    """Layer norm (Ba, Kiros and Hinton 2016)."""

    statistics = 2  # mean and deviation

    def __init__(self, hidden: int, eps: float, build: LayerBuilder, **options: bool) -> None:
        super().__init__(hidden, eps, build, **options)
        assert not self.zero_centered  # see model.presets
        bias = ParameterSpec((hidden,), Constant(0.0), weight_decay=False)
        self.bias = build.parameter("bias", bias)

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + added, and that normalized."""
        weight, bias = (self.region.replicated(each) for each in (self.weight, self.bias))
        order = stored_order(x)
        total = order(x) if added is None else order(x) + order(added).contiguous()
        normed = layer_norm(total, weight, bias, self.eps, self.kernels)
        again = partial(layer_norm, total.detach(), self.weight, self.bias, self.eps, self.kernels)
        total, normed = order(total), order(normed)
        return total, recomputable(normed, again) if self.recomputed else normed


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
