"""Causal self-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megaphase.distributed.costs import (
    FP32_BYTES,
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
from megaphase.model.attention_rule import AttentionRule
from megaphase.model.forward_context import ForwardContext
from megaphase.model.interleave import Stages
from megaphase.model.qk_norm import QKNorm
from megaphase.model.shape import GPTShape
from megaphase.ops.capped_attention import SCORES_AT_ONCE

# FlashAttention recomputes the scores: five products for two (Dao 2023, section 3.1).
_BACKWARD_ATTENTION = 2.5
# Causal attention skips the blocks above the diagonal; with a mask nothing is skipped.
_CAUSAL_SHARE = 0.5


def attention_mask_rows(rank: Rank, rule: AttentionRule) -> int:
    """Rows of the mask of a micro-batch's attention, one for each query; 0 where none is needed."""
    if rank.device == "cuda" and (rank.bf16 or rule.softcap is not None):
        return 0  # bounds of documents and windows, or blocks
    if rank.masked:
        return rank.tokens
    return 0 if rule.window is None and rule.softcap is None else rank.halves * rank.seq_len


class Attention(CostedLayer):
    """Causal self-attention with grouped queries (Ainslie et al. 2023); heads are sharded."""

    def __init__(self, shape: GPTShape, build: LayerBuilder) -> None:
        super().__init__()
        self.shape, self.head_dim = shape, shape.head_size
        self.rule = AttentionRule.of(shape)
        selective = shape.activation_checkpointing == "selective"
        self.recomputed_input = selective and shape.norm_before
        tensor_size = build.region.grid.tensor_size
        heads, kv_heads = (n // tensor_size for n in (shape.heads, shape.kv_heads))
        self.local_heads = (heads, kv_heads, kv_heads)
        self.qkv = ColumnParallelLinear(
            shape.hidden,
            shape.qkv_segments,
            bias=shape.has_qkv_bias,
            std=shape.init_std,
            build=build.at("qkv"),
        )
        self.qk_norm = None
        if shape.qk_norm is not None:
            self.qk_norm = QKNorm(shape, build.at("qk_norm"))
        self.out = RowParallelLinear(
            shape.attention_width,
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
        """softmax(q kᵀ / √head_dim) v of this rank's heads, or as `rule` has it,
        [batch, seq, attention_width / tensor]."""
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        if self.qk_norm is not None:
            heads = self.qk_norm(heads, self.local_heads)
        if context.rotary is None:
            q, k, v = heads.split(self.local_heads, dim=2)
        else:
            q, k, v = context.rotary(heads, self.local_heads)
        y = context.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return y.transpose(1, 2).flatten(2)

    def flops_per_token(self, seq_len: int) -> int:
        return 4 * self.shape.attention_width * min(seq_len, self.rule.window or seq_len)

    def forward_work(self, rank: Rank) -> Work:
        return Work(0, self._attention_flops(rank), self._rotary_traffic(rank))

    def backward_work(self, rank: Rank) -> Work:
        flops = self._attention_flops(rank) * _BACKWARD_ATTENTION
        return Work(0, flops, self._rotary_traffic(rank))

    def _attention_flops(self, rank: Rank) -> float:
        """FLOPs of the scores and of their product with the values."""
        seq, window = self.shape.seq_len, self.rule.window
        keys = (
            seq * _CAUSAL_SHARE if window is None else window * (1 - _CAUSAL_SHARE * window / seq)
        )
        if attention_mask_rows(rank, self.rule):
            keys = seq
        return 4 * rank.tokens * keys * self.shape.attention_width / rank.tensor

    def _rotary_traffic(self, rank: Rank) -> int:
        """Queries, keys and values are read, and written side by side."""
        return 2 * self._qkv_bytes(rank) if self.shape.position == "rotary" else 0

    def _qkv_bytes(self, rank: Rank) -> int:
        return rank.tokens * rank.compute_bytes * (sum(self.shape.qkv_segments) // rank.tensor)

    def _query_bytes(self, rank: Rank) -> int:
        return rank.tokens * rank.compute_bytes * (self.shape.attention_width // rank.tensor)

    def saved(self, rank: Rank) -> Mapping[str, int]:
        """From the input of `qkv` to that of `out`."""
        shape, queries = self.shape, self._query_bytes(rank)
        saved = {"qkv": self._qkv_bytes(rank), "output": queries}
        if rank.widened:
            in_fp32 = FP32_BYTES // rank.compute_bytes
            saved = {"qkv": in_fp32 * saved["qkv"], "output": queries + in_fp32 * queries}
        if not self.recomputed_input:
            saved["input"] = residual_bytes(rank, shape.hidden)
        saved["logsumexp"] = rank.tokens * (shape.heads // rank.tensor) * FP32_BYTES
        if self.rule.softcap is not None:
            return saved
        if rows := attention_mask_rows(rank, self.rule):
            # Added to the scores of all heads.
            saved["mask"] = rows * rank.compute_bytes * shape.seq_len
        in_fp32_on_gpu = rank.device == "cuda" and not rank.bf16
        one_by_one = rank.masked or self.rule.window is not None or in_fp32_on_gpu
        if one_by_one and shape.kv_heads < shape.heads:
            saved["repeated"] = 2 * queries
        return saved

    def _score_bytes(self, rank: Rank) -> int:
        """Scores, their gradients and what these are computed from, where no kernel is fused."""
        if self.rule.softcap is None or rank.device == "cuda":
            return 0
        of_a_head = rank.tokens * rank.seq_len
        of_a_key = self.shape.heads // self.shape.kv_heads * rank.seq_len**2
        scores = min(SCORES_AT_ONCE, self.shape.heads // rank.tensor * of_a_head)
        return 4 * FP32_BYTES * max(of_a_key, scores)

    def backward_stages(self, rank: Rank) -> Sequence[BackwardStage]:
        """`out`, attention, rotary positions, norm of queries and keys, `qkv`."""
        whole, residual = (f(rank, self.shape.hidden) for f in (region_bytes, residual_bytes))
        gradient = output_gradient_bytes(rank, self.shape.hidden)
        queries, qkv = self._query_bytes(rank), self._qkv_bytes(rank)
        input_ = whole + (residual if self.recomputed_input else 0)
        norm: tuple[BackwardStage, ...] = ()
        if self.qk_norm is not None:
            transient = gradient + 2 * qkv + self.qk_norm.uncompiled_bytes(rank)
            norm = (BackwardStage(transient, sum(self.qk_norm.saved(rank).values())),)
        return (
            BackwardStage(gradient + queries + self.out.product_bytes(rank)),
            BackwardStage(
                gradient + queries + qkv + self._score_bytes(rank),
                released=self.saved(rank)["output"],
            ),
            BackwardStage(gradient + 2 * qkv),
            *norm,
            BackwardStage(gradient + qkv + input_ + self.qkv.product_bytes(rank)),
        )
