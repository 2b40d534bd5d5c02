"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from megaphase.distributed.costs import (
    BackwardStage,
    CostedLayer,
    Rank,
    Work,
    output_gradient_bytes,
    region_bytes,
    residual_bytes,
)
from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.linear import ColumnParallelLinear, RowParallelLinear
from megaphase.model.forward_context import ForwardContext
from megaphase.model.interleave import Stages
from megaphase.model.shape import GPTShape
from megaphase.ops.gated import gated
from megaphase.ops.recompute import recomputable


class FeedForward(CostedLayer):
    """Feed-forward layer with SwiGLU, GEGLU (Shazeer 2020) or GELU; its inner dimension is
    sharded."""

    def __init__(self, shape: GPTShape, build: LayerBuilder) -> None:
        super().__init__()
        self.shape = shape
        self.activation: Callable[[Tensor], Tensor] = partial(F.gelu, approximate="tanh")
        if shape.gated:
            self.activation = partial(gated, name=shape.activation, kernels=build.kernels)
        self.recomputed = shape.activation_checkpointing == "selective"
        self.recomputed_input = self.recomputed and shape.norm_before
        self.up = ColumnParallelLinear(
            shape.hidden,
            shape.ffn_segments,
            bias=shape.bias,
            std=shape.init_std,
            build=build.at("up"),
        )
        self.down = RowParallelLinear(
            shape.ffn,
            shape.hidden,
            bias=shape.bias,
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
        inner = self.activation(up)
        return (
            recomputable(inner, partial(self.activation, up.detach())) if self.recomputed else inner
        )

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
        # A gate has two more tensors where each operation is a kernel of its own.
        gate_bytes = 2 * inner if self.shape.gated and not rank.compiled else 0
        again = inner if self.recomputed else 0
        input_ = whole + (residual if self.recomputed_input else 0)
        return (
            BackwardStage(
                again + gradient + inner + self.down.product_bytes(rank),
                released=saved.get("inner", 0),
            ),
            BackwardStage(gradient + inner + up + gate_bytes),
            BackwardStage(
                gradient + up + input_ + self.up.product_bytes(rank),
                released=saved["up"] + saved.get("input", 0),
            ),
        )
