"""Norm of queries and keys (Henry et al. 2020), before their rotation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from megaphase.distributed.collectives import start_all_reduce
from megaphase.distributed.costs import (
    FP32_BYTES,
    Collective,
    CollectiveKind,
    CostedLayer,
    Rank,
    Work,
)
from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.parameter_spec import Constant, ParameterSpec
from megaphase.model.shape import GPTShape
from megaphase.ops.qk_norm import AllHeads, qk_norm

_FORWARD_PASSES, _BACKWARD_PASSES = 2, 3


class Scale(nn.Module):
    """The weight of a norm."""

    def __init__(self, spec: ParameterSpec, build: LayerBuilder) -> None:
        super().__init__()
        self.weight = build.parameter("weight", spec)


class QKNorm(CostedLayer):
    """RMS norm of queries and keys: of every head by one weight for all heads (Qwen 3), or of all
    heads together (OLMo 2), which sums over the tensor-parallel ranks."""

    def __init__(self, shape: GPTShape, build: LayerBuilder) -> None:
        super().__init__()
        self.shape, self.region, self.kernels = shape, build.region, build.kernels
        self.of_heads = shape.qk_norm == "head"
        queries, keys, _ = shape.qkv_segments
        self.together = None
        if not self.of_heads:
            self.together = AllHeads((queries, keys), self._sum_over_ranks)
        self.query, self.key = (
            Scale(self._spec(width), build.at(name))
            for name, width in (("query", queries), ("key", keys))
        )

    def _spec(self, width: int) -> ParameterSpec:
        start = Constant(0.0 if self.shape.zero_centered_norms else 1.0)
        if self.of_heads:
            return ParameterSpec((self.shape.head_size,), start, weight_decay=False)
        return ParameterSpec((width,), start, weight_decay=False, dim=0)

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        grid = self.region.grid
        return x if grid.tensor_size == 1 else start_all_reduce(x, grid).finish()

    def forward(self, heads: Tensor, counts: tuple[int, int, int]) -> Tensor:
        """[batch, seq, sum(counts), head_dim], queries, keys and values, of which the values stay
        as they are."""
        query: Tensor = self.query.weight
        key: Tensor = self.key.weight
        if self.of_heads:
            query, key = self.region.replicated_inside(query, key)
        settings = (self.shape.norm_eps, self.together, self.kernels)
        zero_centered = bool(self.shape.zero_centered_norms)
        return qk_norm(heads, (query, key), counts, *settings, zero_centered)

    def _heads_bytes(self, rank: Rank) -> int:
        width = sum(self.shape.qkv_segments) // rank.tensor
        return rank.tokens * rank.compute_bytes * width

    def forward_work(self, rank: Rank) -> Work:
        return Work(0, 0, _FORWARD_PASSES * self._heads_bytes(rank))

    def backward_work(self, rank: Rank) -> Work:
        return Work(0, 0, _BACKWARD_PASSES * self._heads_bytes(rank))

    def saved(self, rank: Rank) -> Mapping[str, int]:
        heads = (self.shape.heads + self.shape.kv_heads) // rank.tensor
        return {"input": self._heads_bytes(rank), "scales": rank.tokens * heads * FP32_BYTES}

    def uncompiled_bytes(self, rank: Rank) -> int:
        """Bytes that the backward pass needs in addition where each operation is a kernel of its
        own."""
        width = (self.shape.qkv_segments[0] + self.shape.qkv_segments[1]) // rank.tensor
        return 0 if rank.compiled else 4 * rank.tokens * width * FP32_BYTES

    def forward_collectives(self, rank: Rank) -> Sequence[Collective]:
        return () if self.of_heads else (self._statistics(rank),)

    def backward_collectives(self, rank: Rank) -> Sequence[Collective]:
        if not self.of_heads:
            return (self._statistics(rank),)
        if rank.sequence:
            return ()
        # Of both weights, in one sum for each half.
        size = rank.halves * 2 * self.shape.head_size * rank.parameter_bytes
        return (Collective(CollectiveKind.ALL_REDUCE, size),)

    def _statistics(self, rank: Rank) -> Collective:
        """One value of the queries and one of the keys of each token."""
        return Collective(CollectiveKind.ALL_REDUCE, 2 * rank.tokens * FP32_BYTES)
