"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.linear import ColumnParallelLinear, RowParallelLinear
from megaphase.model.forward_context import ForwardContext
from megaphase.model.interleave import Stages
from megaphase.model.shape import GPTShape
from megaphase.ops.recompute import recomputable
from megaphase.ops.swiglu import swiglu


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020) or GELU feed-forward layer; its inner dimension is sharded."""

    def __init__(self, shape: GPTShape, build: LayerBuilder) -> None:
        super().__init__()
        self.activation: Callable[[Tensor], Tensor] = partial(F.gelu, approximate="tanh")
        if shape.activation == "swiglu":
            self.activation = partial(swiglu, kernels=build.kernels)
        self.recomputed = shape.activation_checkpointing == "selective"
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
