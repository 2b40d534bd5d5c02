"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megaphase.distributed.costs import (
    FP32_BYTES,
    BackwardStage,
    Collective,
    CollectiveKind,
    CostedLayer,
    Rank,
    Work,
    output_gradient_bytes,
    region_bytes,
    residual_bytes,
)
from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.linear import ColumnParallelLinear, RowParallelLinear
from megaphase.distributed.parameter_spec import Constant, ParameterSpec
from megaphase.model.forward_context import ForwardContext
from megaphase.model.interleave import Stages
from megaphase.model.shape import GPTShape
from megaphase.ops.gated import gated
from megaphase.ops.recompute import recomputable
from megaphase.ops.xielu import INITIAL_NEGATIVE, INITIAL_POSITIVE, xielu


class XIELU(nn.Module):
    """The two scalars of xIELU; see `ops.xielu`."""

    def __init__(self, build: LayerBuilder) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = (
            build.parameter(name, ParameterSpec((1,), Constant(start), weight_decay=False))
            for name, start in (("alpha_p", INITIAL_POSITIVE), ("alpha_n", INITIAL_NEGATIVE))
        )


class FeedForward(CostedLayer):
    """Feed-forward layer with SwiGLU, GEGLU (Shazeer 2020), GELU or xIELU; its inner dimension is
    sharded."""

    def __init__(self, shape: GPTShape, build: LayerBuilder) -> None:
        super().__init__()
        self.shape, self.region, self.kernels = shape, build.region, build.kernels
        self.xielu = XIELU(build.at("xielu")) if shape.activation == "xielu" else None
        self.recomputed = shape.activation_checkpointing == "selective"
        self.recomputed_input = self.recomputed and shape.norm_before
        self.up = ColumnParallelLinear(
            shape.hidden,
            shape.ffn_segments,
            bias=shape.has_ffn_bias,
            std=shape.init_std,
            build=build.at("up"),
        )
        self.down = RowParallelLinear(
            shape.ffn,
            shape.hidden,
            bias=shape.has_ffn_bias,
            std=shape.residual_init_std,
            build=build.at("down"),
        )

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        return self.down(self.activate(self.up(x), context))

    @property
    def stages(self) -> Stages:
        """`forward`, for the interleaving of halves."""
        return Stages(self.up, self.activate, self.down)

    def activate(self, up: Tensor, _: ForwardContext) -> Tensor:
        """[batch, seq, ffn_segments / tensor] -> [batch, seq, ffn / tensor]."""
        if self.xielu is None:
            inner, again = self._activated(up), partial(self._activated, up.detach())
        else:
            scalars = self.xielu.alpha_p, self.xielu.alpha_n
            positive, negative = self.region.replicated_inside(*scalars)
            inner = xielu(up, positive, negative, self.kernels)
            again = partial(xielu, up.detach(), *scalars, self.kernels)
        return recomputable(inner, again) if self.recomputed else inner

    def _activated(self, up: Tensor) -> Tensor:
        """By an activation without parameters."""
        if self.shape.gated:
            return gated(up, self.shape.activation, self.kernels)
        return F.gelu(up, approximate="none" if self.shape.activation == "gelu_erf" else "tanh")

    def _up_bytes(self, rank: Rank) -> int:
        return rank.tokens * rank.compute_bytes * (sum(self.shape.ffn_segments) // rank.tensor)

    def _inner_bytes(self, rank: Rank) -> int:
        return rank.tokens * rank.compute_bytes * (self.shape.ffn // rank.tensor)

    def forward_work(self, rank: Rank) -> Work:
        return Work(0, 0, self._up_bytes(rank) + self._inner_bytes(rank))

    def backward_work(self, rank: Rank) -> Work:
        return Work(0, 0, 2 * self._up_bytes(rank) + self._inner_bytes(rank))

    def recomputed_work(self, rank: Rank) -> Work:
        return self.forward_work(rank) if self.recomputed else Work()

    def backward_collectives(self, rank: Rank) -> Sequence[Collective]:
        if self.xielu is None or rank.sequence:
            return ()
        # Of both scalars, in one sum for each half.
        return (Collective(CollectiveKind.ALL_REDUCE, rank.halves * 2 * rank.parameter_bytes),)

    def saved(self, rank: Rank) -> Mapping[str, int]:
        """From the input of `up` to that of `down`."""
        saved = {"up": self._up_bytes(rank)}
        if not self.recomputed_input:
            saved["input"] = residual_bytes(rank, self.shape.hidden)
        if not self.recomputed:
            saved["inner"] = self._inner_bytes(rank)
        return saved

    def backward_stages(self, rank: Rank) -> Sequence[BackwardStage]:
        """`down`, activation, `up`."""
        whole, residual = (f(rank, self.shape.hidden) for f in (region_bytes, residual_bytes))
        gradient = output_gradient_bytes(rank, self.shape.hidden)
        up, inner, saved = self._up_bytes(rank), self._inner_bytes(rank), self.saved(rank)
        # Further tensors where each operation is a kernel of its own.
        uncompiled = 0
        if self.shape.gated and not rank.compiled:
            uncompiled = 2 * inner
        elif self.xielu is not None and not rank.compiled:
            uncompiled = 4 * inner * FP32_BYTES // rank.compute_bytes
        again = inner if self.recomputed else 0
        input_ = whole + (residual if self.recomputed_input else 0)
        return (
            BackwardStage(
                again + gradient + inner + self.down.product_bytes(rank),
                released=saved.get("inner", 0),
            ),
            BackwardStage(gradient + inner + up + uncompiled),
            BackwardStage(
                gradient + up + input_ + self.up.product_bytes(rank),
                released=saved["up"] + saved.get("input", 0),
            ),
        )
