"""The GPT: a pre-norm decoder-only transformer whose linear layers are tensor-parallel.

Activations are [batch, seq, hidden]; with sequence parallelism everything outside the attention
and feed-forward regions is [batch, seq / tensor, hidden].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaphase.model.dropout import Dropout
from megaphase.model.kv_cache import CachedTokens
from megaphase.model.packed_rows import own_document_mask, positions_in_document
from megaphase.model.rotary import Rotary
from megaphase.model.shape import GPTShape
from megaphase.model.swiglu import swiglu
from megaphase.parallel.cross_entropy import vocab_parallel_cross_entropy
from megaphase.parallel.layers import (
    NORMS,
    ColumnParallelLinear,
    RowParallelLinear,
    TensorRegion,
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_weight,
)
from megaphase.parallel.rng import Initializer
from megaphase.parallel.topology import Topology, device
from megaphase.targets import IGNORED_TARGET


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023); heads are sharded."""

    def __init__(self, shape: GPTShape, init: Initializer, region: TensorRegion) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.queries_per_key = shape.heads // shape.kv_heads
        heads, kv_heads = (n // region.topology.tensor_size for n in (shape.heads, shape.kv_heads))
        self.local_heads = (heads, kv_heads, kv_heads)
        self.qkv = ColumnParallelLinear(
            shape.hidden,
            shape.qkv_segments,
            bias=shape.bias,
            std=shape.init_std,
            init=init.at("qkv"),
            region=region,
        )
        self.out = RowParallelLinear(
            shape.hidden,
            shape.hidden,
            bias=shape.bias,
            std=_residual_std(shape),
            init=init.at("out"),
            region=region,
        )

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor | None,
        cached: CachedTokens | None = None,
    ) -> Tensor:
        batch, seq, _ = x.shape
        heads = self.qkv(x).view(batch, seq, -1, self.head_dim)
        if rotary is None:
            parts = heads.split(self.local_heads, dim=2)
        else:
            parts = rotary(heads, self.local_heads)
        q, k, v = (part.transpose(1, 2) for part in parts)
        y = self._attend(q, k, v, mask) if cached is None else cached.attend(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, seq, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        grouped = self.queries_per_key > 1
        if mask is not None and grouped:
            # The fused GPU kernel that takes a mask knows no groups; without it, the scores of all
            # heads would be stored.
            k, v = (each.repeat_interleave(self.queries_per_key, 1) for each in (k, v))
            grouped = False
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=grouped
        )


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020) or GELU feed-forward layer; its inner dimension is sharded."""

    def __init__(self, shape: GPTShape, init: Initializer, region: TensorRegion) -> None:
        super().__init__()
        self.gated = shape.activation == "swiglu"
        self.up = ColumnParallelLinear(
            shape.hidden,
            shape.ffn_segments,
            bias=shape.bias,
            std=shape.init_std,
            init=init.at("up"),
            region=region,
        )
        self.down = RowParallelLinear(
            shape.ffn,
            shape.hidden,
            bias=shape.bias,
            std=_residual_std(shape),
            init=init.at("down"),
            region=region,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down(swiglu(self.up(x)))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); dropout of what is added."""

    def __init__(self, shape: GPTShape, init: Initializer, region: TensorRegion) -> None:
        super().__init__()
        norm = NORMS[shape.norm]
        self.region = region
        self.attention_norm = norm(shape.hidden, shape.norm_eps, init, region)
        self.attention = Attention(shape, init.at("attention"), region)
        self.attention_dropout = Dropout(shape.dropout, f"{init.path}attention", region)
        self.feed_forward_norm = norm(shape.hidden, shape.norm_eps, init, region)
        self.feed_forward = FeedForward(shape, init.at("feed_forward"), region)
        self.feed_forward_dropout = Dropout(shape.dropout, f"{init.path}feed_forward", region)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor | None,
        cached: CachedTokens | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        added = self.attention(self.region.enter(self.attention_norm(x)), rotary, mask, cached)
        x = x + self.attention_dropout(added, dropout_seeds)
        added = self.feed_forward(self.region.enter(self.feed_forward_norm(x)))
        return x + self.feed_forward_dropout(added, dropout_seeds)


class GPT(nn.Module):
    """Embedding, blocks, final norm and output projection.

    Args:
        compute_dtype: type of the activations; weights of another type are cast when used.
    """

    def __init__(
        self,
        shape: GPTShape,
        init: Initializer,
        topology: Topology,
        *,
        sequence_parallel: bool = False,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.compute_dtype = compute_dtype
        self.region = region = TensorRegion(topology, sequence_parallel)
        self.embedding = VocabParallelEmbedding(
            shape.vocab, shape.hidden, std=shape.init_std, init=init.at("embedding"), region=region
        )
        self.embedding_dropout = Dropout(shape.dropout, "embedding", region)
        self.positions = None
        self.rotary = None
        if shape.position == "learned":
            whole = init.at("positions").normal(
                "weight", (shape.seq_len, shape.hidden), shape.init_std
            )
            self.positions = nn.Parameter(whole.to(device()))
        else:
            self.rotary = Rotary(shape.head_dim, shape.seq_len, shape.rotary_base, compute_dtype)
        self.blocks = nn.ModuleList(
            Block(shape, init.at(f"blocks.{i}"), region) for i in range(shape.layers)
        )
        self.norm = NORMS[shape.norm](shape.hidden, shape.norm_eps, init, region)
        if shape.tied_embeddings:
            weight = self.embedding.weight
        else:
            weight = vocab_parallel_weight(
                shape.vocab, shape.hidden, shape.init_std, init.at("head"), topology
            )
        self.head = VocabParallelHead(shape.vocab, weight, region)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """Loss of every token, or this rank's logits when there are no targets.

        tokens, targets: int64 [batch, seq], seq up to shape.seq_len; targets may hold
        IGNORED_TARGET. documents: int64 [batch, seq], ascending along a row; where they are given,
        a token sees those of its own document alone. dropout_seeds: int64 [batch], see
        `dropout.row_seeds`; nothing is dropped where they are missing. Returns nats, fp32
        [batch, seq] with 0 at ignored targets, or logits [batch, seq, vocabulary of this rank].
        """
        x = self.embedding_dropout(self._embed(tokens, documents), dropout_seeds)
        mask = None if documents is None else own_document_mask(documents)
        for block in self.blocks:
            if self.shape.activation_checkpointing == "full" and self.training:
                x = checkpoint(
                    block, x, self.rotary, mask, None, dropout_seeds, use_reentrant=False
                )
            else:
                x = block(x, self.rotary, mask, None, dropout_seeds)
        logits = self.head(self.region.enter(self.norm(x)))
        if targets is None:
            return logits
        return vocab_parallel_cross_entropy(
            logits,
            targets,
            ignored=IGNORED_TARGET,
            first=self.head.first_row,
            topology=self.region.topology,
        )

    def _embed(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        x = self.embedding(tokens).to(self.compute_dtype)
        if self.positions is not None:
            positions = self.region.replicated(self.positions)
            if documents is None:
                positions = positions[: tokens.shape[1]]
            else:
                positions = F.embedding(positions_in_document(documents), positions)
            x = x + self.region.own_positions(positions).to(self.compute_dtype)
        return x


def _residual_std(shape: GPTShape) -> float:
    """Layers that write to the residual stream start smaller (Radford et al. 2019, section 2.3)."""
    return shape.init_std / math.sqrt(2 * shape.layers)
