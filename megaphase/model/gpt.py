"""The GPT: a pre-norm decoder-only transformer whose linear layers are tensor-parallel.

Activations are [batch, seq, hidden]; with sequence parallelism everything outside the attention
and feed-forward regions is [batch, seq / tensor, hidden].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaphase.distributed.initialization import Initializer
from megaphase.distributed.layers import (
    NORMS,
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_weight,
)
from megaphase.distributed.process_grid import ProcessGrid, device
from megaphase.distributed.tensor_region import TensorRegion
from megaphase.model.document_mask import (
    AttentionFn,
    attend_within,
    positions_in_document,
)
from megaphase.model.dropout import Dropout
from megaphase.model.interleave import Steps, interleave
from megaphase.model.rotary import Rotary
from megaphase.model.shape import GPTShape
from megaphase.ops.attention import attention
from megaphase.ops.kernels import EAGER, Kernels
from megaphase.ops.recompute import recompute
from megaphase.ops.swiglu import swiglu
from megaphase.utils.targets import IGNORED_TARGET

Keep = Callable[[], AbstractContextManager[None]]


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023); heads are sharded."""

    def __init__(self, shape: GPTShape, init: Initializer, region: TensorRegion) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        heads, kv_heads = (n // region.grid.tensor_size for n in (shape.heads, shape.kv_heads))
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

    def steps(self, x: Tensor, rotary: Rotary | None, attend: AttentionFn, keep: Keep) -> Steps:
        """Its output in three steps, see `interleave`; keep: around the operations that keep x."""
        arriving = self.qkv.start(x)
        yield
        with keep():
            qkv = arriving()
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        if rotary is None:
            parts = heads.split(self.local_heads, dim=2)
        else:
            parts = rotary(heads, self.local_heads)
        q, k, v = (part.transpose(1, 2) for part in parts)
        attended = attend(q, k, v).transpose(1, 2).flatten(2)
        yield
        leaving = self.out.start(attended)
        yield
        return leaving()


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020) or GELU feed-forward layer; its inner dimension is sharded."""

    def __init__(
        self, shape: GPTShape, init: Initializer, region: TensorRegion, kernels: Kernels
    ) -> None:
        super().__init__()
        self.activate: Callable[[Tensor], Tensor] = partial(F.gelu, approximate="tanh")
        if shape.activation == "swiglu":
            self.activate = partial(swiglu, kernels=kernels)
        self.keep_again = shape.activation_checkpointing == "selective"
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

    def steps(self, x: Tensor, keep: Keep) -> Steps:
        """Its output in three steps, see `interleave`; keep: around the operations that keep x."""
        arriving = self.up.start(x)
        yield
        with keep():
            up = arriving()
        inner = self.activate(up)
        yield
        with recompute(inner, partial(self.activate, up.detach()), self.keep_again):
            leaving = self.down.start(inner)
        yield
        return leaving()


@dataclass(frozen=True)
class Rows:
    """What blocks know of the rows that they are given.

    attend: attention within them. dropout_seeds: int64 [rows], see `dropout.row_seeds`.
    """

    attend: AttentionFn = attention
    dropout_seeds: Tensor | None = None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); dropout of what is added."""

    def __init__(
        self, shape: GPTShape, init: Initializer, region: TensorRegion, kernels: Kernels
    ) -> None:
        super().__init__()
        norm = NORMS[shape.norm]
        self.region = region
        self.keep_again = shape.activation_checkpointing == "selective"
        self.attention_norm = norm(shape.hidden, shape.norm_eps, init, region, kernels)
        self.attention = Attention(shape, init.at("attention"), region)
        self.attention_dropout = Dropout(shape.dropout, f"{init.path}attention", region)
        self.feed_forward_norm = norm(shape.hidden, shape.norm_eps, init, region, kernels)
        self.feed_forward = FeedForward(shape, init.at("feed_forward"), region, kernels)
        self.feed_forward_dropout = Dropout(shape.dropout, f"{init.path}feed_forward", region)

    def forward(
        self, rotary: Rotary | None, rows: Sequence[Rows], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        """parts: the activations of some rows each, which are computed in turn.

        They are arguments of their own, because ZeRO-3's hooks see no others.
        """
        with self.region.shared(self):
            return interleave(
                [partial(self._steps, x, rotary, of) for x, of in zip(parts, rows, strict=True)]
            )

    def _steps(self, x: Tensor, rotary: Rotary | None, rows: Rows) -> Steps:
        x, normed = self.attention_norm(x)
        keep = self._keep(normed, self.attention_norm.again(x))
        added = yield from self.attention.steps(normed, rotary, rows.attend, keep)
        added = self.attention_dropout(added, rows.dropout_seeds)
        x, normed = self.feed_forward_norm(x, added)
        keep = self._keep(normed, self.feed_forward_norm.again(x))
        added = yield from self.feed_forward.steps(normed, keep)
        return x + self.feed_forward_dropout(added, rows.dropout_seeds)

    def _keep(self, normed: Tensor, again: Callable[[], Tensor]) -> Keep:
        return partial(recompute, normed, again, self.keep_again)


class GPT(nn.Module):
    """Embedding, blocks, final norm and output projection.

    Args:
        compute_dtype: type of the activations; weights of another type are cast when used.
        kernels: what computes the parts between the matrix products.
        overlap: compute half of the rows while the tensor-parallel collectives of the others go on.
    """

    def __init__(
        self,
        shape: GPTShape,
        init: Initializer,
        grid: ProcessGrid,
        *,
        sequence_parallel: bool = False,
        compute_dtype: torch.dtype = torch.float32,
        kernels: Kernels = EAGER,
        overlap: bool = True,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.overlap = overlap and grid.tensor_size > 1
        self.compute_dtype = compute_dtype
        self.region = region = TensorRegion(grid, sequence_parallel)
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
            self.rotary = Rotary(
                shape.head_dim, shape.seq_len, shape.rotary_base, compute_dtype, kernels
            )
        self.blocks = nn.ModuleList(
            Block(shape, init.at(f"blocks.{i}"), region, kernels) for i in range(shape.layers)
        )
        self.norm = NORMS[shape.norm](shape.hidden, shape.norm_eps, init, region, kernels)
        if shape.tied_embeddings:
            weight = self.embedding.weight
        else:
            weight = vocab_parallel_weight(
                shape.vocab, shape.hidden, shape.init_std, init.at("head"), grid
            )
        self.head = VocabParallelHead(shape.vocab, weight, region, IGNORED_TARGET, kernels)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The sum of all losses and the loss of every token, or logits when there are no targets.

        tokens, targets: int64 [batch, seq], seq up to shape.seq_len; targets may hold
        IGNORED_TARGET. documents: int64 [batch, seq], ascending along a row; where they are given,
        a token sees those of its own document alone. dropout_seeds: int64 [batch], see
        `dropout.row_seeds`; nothing is dropped where they are missing. Returns nats, fp32 [] and
        [batch, seq] with 0 at ignored targets, of which the sum alone has a gradient; or logits
        [batch, seq, vocabulary of this rank].
        """
        x = self.embedding_dropout(self._embed(tokens, documents), dropout_seeds)
        halves = 2 if self.overlap and len(tokens) > 1 else 1
        rows = self._rows(documents, dropout_seeds, halves)
        parts = x.chunk(halves)
        for block in self.blocks:
            if self.shape.activation_checkpointing == "full" and self.training:
                parts = checkpoint(block, self.rotary, rows, *parts, use_reentrant=False)
            else:
                parts = block(self.rotary, rows, *parts)
        _, normed = self.norm(parts[0] if halves == 1 else torch.cat(parts))
        return self.head(normed, targets)

    def _rows(
        self, documents: Tensor | None, dropout_seeds: Tensor | None, parts: int
    ) -> list[Rows]:
        attends: list[AttentionFn] = [attention] * parts
        if documents is not None:
            attends = [attend_within(part, self.compute_dtype) for part in documents.chunk(parts)]
        seeds = [None] * parts if dropout_seeds is None else dropout_seeds.chunk(parts)
        return [Rows(*each) for each in zip(attends, seeds, strict=True)]

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
