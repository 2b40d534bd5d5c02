"""Causal self-attention."""

from __future__ import annotations

from torch import Tensor, nn

from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.linear import ColumnParallelLinear, RowParallelLinear
from megaphase.model.forward_context import ForwardContext
from megaphase.model.interleave import Stages
from megaphase.model.shape import GPTShape


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023); heads are sharded."""

    def __init__(self, shape: GPTShape, build: LayerBuilder) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        tensor_size = build.region.grid.tensor_size
        heads, kv_heads = (n // tensor_size for n in (shape.heads, shape.kv_heads))
        self.local_heads = (heads, kv_heads, kv_heads)
        self.qkv = ColumnParallelLinear(
            shape.hidden,
            shape.qkv_segments,
            bias=shape.bias,
            std=shape.init_std,
            build=build.at("qkv"),
        )
        self.out = RowParallelLinear(
            shape.hidden,
            shape.hidden,
            bias=shape.bias,
            std=shape.residual_init_std,
            build=build.at("out"),
        )

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        return self.out(self.attend(self.qkv(x), context))

    @property
    def stages(self) -> Stages:
        """`forward`, for the interleaving of halves."""
        return Stages(self.qkv, self.attend, self.out)

    def attend(self, qkv: Tensor, context: ForwardContext) -> Tensor:
        """softmax(q kᵀ / √head_dim) v of this rank's heads, [batch, seq, hidden / tensor]."""
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        if context.rotary is None:
            q, k, v = heads.split(self.local_heads, dim=2)
        else:
            q, k, v = context.rotary(heads, self.local_heads)
        y = context.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return y.transpose(1, 2).flatten(2)
