"""The GPT: a pre-norm decoder-only transformer whose linear layers are tensor-parallel.

Activations are [batch, seq, hidden]; with sequence parallelism everything outside the attention
and feed-forward layers is [batch, seq / tensor, hidden].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaphase.distributed.costs import CostedLayer, Rank
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.parameter_spec import Normal, ParameterSpec, spec_of
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.distributed.tensor_region import TensorRegion
from megaphase.distributed.vocab_parallel import VocabParallelEmbedding, VocabParallelHead
from megaphase.model.attention import Attention, attention_mask_rows
from megaphase.model.attention_rule import AttentionRule
from megaphase.model.config import RotaryConfig
from megaphase.model.document_mask import (
    AttentionFn,
    DocumentBounds,
    attend_before,
    attend_within,
    positions_in_document,
)
from megaphase.model.dropout import Dropout
from megaphase.model.forward_context import ForwardContext
from megaphase.model.interleave import ResidualBranch, branch_steps, interleave
from megaphase.model.kv_cache import CachedBatch, KVCache
from megaphase.model.mlp import FeedForward
from megaphase.model.norms import NORMS, LayerNorm, RMSNorm
from megaphase.model.rotary import Rotary
from megaphase.model.shape import GPTShape
from megaphase.ops.kernels import EAGER, Kernels
from megaphase.ops.row_order import sequence_first
from megaphase.utils.targets import IGNORED_TARGET


class Block(CostedLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), or with norms of the layers' outputs
    (`shape.norm_position`), or both layers of the same x (`shape.parallel_residual`); dropout of
    what is added.

    Attributes:
        attention_layer, feed_forward_layer: the classes of its layers.
    """

    attention_layer: type[Attention] = Attention
    feed_forward_layer: type[FeedForward] = FeedForward

    def __init__(self, shape: GPTShape, build: LayerBuilder) -> None:
        super().__init__()
        self.region, self.shape = build.region, shape
        before = _block_norm if shape.norm_before else _no_norm
        after = _post_norm if shape.norm_after else _no_norm
        self.attention_norm = before(shape, build.at("attention_norm"))
        self.attention = self.attention_layer(shape, build.at("attention"))
        self.attention_post_norm = after(shape, build.at("attention_post_norm"))
        self.attention_dropout = _dropout(shape, build.at("attention"))
        shares_input = bool(shape.parallel_residual)
        self.feed_forward_norm = before(
            shape, build.at("feed_forward_norm"), shares_input=shares_input
        )
        self.feed_forward = self.feed_forward_layer(shape, build.at("feed_forward"))
        self.feed_forward_post_norm = after(shape, build.at("feed_forward_post_norm"))
        self.feed_forward_dropout = _dropout(shape, build.at("feed_forward"))

    @property
    def branches(self) -> tuple[ResidualBranch, ...]:
        return (
            ResidualBranch(
                self.attention_norm,
                self.attention,
                self.attention_post_norm,
                self.attention_dropout,
            ),
            ResidualBranch(
                self.feed_forward_norm,
                self.feed_forward,
                self.feed_forward_post_norm,
                self.feed_forward_dropout,
            ),
        )

    def forward(self, contexts: Sequence[ForwardContext], *parts: Tensor) -> tuple[Tensor, ...]:
        """parts: [batch, seq, hidden], the activations of the rows of each context.

        They are arguments of their own, because ZeRO-3's hooks see no others.
        """
        with self.region.shared(self):
            if len(parts) == 1:
                return (self.add_branches(*parts, *contexts),)
            computations = zip(parts, contexts, strict=True)
            parallel = bool(self.shape.parallel_residual)
            steps = [branch_steps(self.branches, *each, parallel) for each in computations]
            return interleave(steps)

    def add_branches(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x + dropout(post_norm(layer(norm(x)))) for one branch after the other, or both of x."""
        outputs: list[Tensor] = []
        for branch in self.branches:
            added = outputs.pop() if outputs and not self.shape.parallel_residual else None
            x, entering = branch.enter(x, added)
            outputs.append(branch.leave(branch.layer(entering, context), context))
        return sum(outputs, x)

    def saved(self, rank: Rank) -> Mapping[str, int]:
        """Bytes that are saved beside those that its layers declare."""
        hidden = self.shape.hidden
        saved = {"dropout": sum(b.dropout.saved_bytes(rank, hidden) for b in self.branches)}
        if rank.compute_bytes != rank.parameter_bytes:
            layouts = [spec_of(each).layout(rank.tensor) for each in self.parameters()]
            elements = sum(layout.shard_numel(rank.tensor) for layout in layouts)
            saved["cast_weights"] = elements * rank.compute_bytes
        return saved


class GPT(CostedLayer):
    """Embedding, blocks, final norm and output projection.

    Args:
        compute_dtype: type of the activations; weights of another type are cast when used.
        kernels: compute the operations between the matrix products.
        overlap: compute half of the rows during the tensor-parallel collectives of the others.
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
        self.region = TensorRegion(grid, sequence_parallel)
        build = LayerBuilder(init, self.region, kernels)
        self.embedding = VocabParallelEmbedding(
            shape.vocab, shape.hidden, std=shape.init_std, build=build.at("embedding")
        )
        self.embedding_dropout = _dropout(shape, build.at("embedding"))
        self.multiplier = None
        if shape.embedding_multiplier is not None:
            # In Gemma it is a tensor of the weights' type.
            self.multiplier = torch.tensor(shape.embedding_multiplier, dtype=compute_dtype).item()
        self.positions = None
        if shape.position == "learned":
            positions = ParameterSpec((shape.position_rows, shape.hidden), Normal(shape.init_std))
            self.positions = build.at("positions").parameter("weight", positions)
        self.blocks = nn.ModuleList(
            Block(shape.of_block(i), build.at(f"blocks.{i}")) for i in range(shape.layers)
        )
        self.norm = _norm(shape, build.at("norm"))
        self.head = VocabParallelHead(
            shape.vocab,
            shape.hidden,
            std=shape.init_std,
            ignored=IGNORED_TARGET,
            tied_to=self.embedding.weight if shape.tied_embeddings else None,
            build=build.at("head"),
            softcap=shape.logit_softcap,
            z_loss=shape.z_loss,
        )
        self._build = build
        self.take_shape(shape)

    @property
    def device(self) -> torch.device:
        """Of its parameters."""
        return self.embedding.weight.device

    @property
    def tensor_size(self) -> int:
        """Tensor-parallel ranks that share it."""
        return self.region.grid.tensor_size

    def take_shape(self, shape: GPTShape) -> None:
        """Have the sequence length and the rotary positions of another shape with the same
        parameters, as a phase of a run may."""
        self.shape = shape
        blocks = [shape.of_block(block) for block in range(shape.layers)]
        self.rules = [AttentionRule.of(block) for block in blocks]
        self.rotary = None
        self.rotaries: list[Rotary | None] = [None] * shape.layers
        if shape.position == "rotary":
            kinds = (shape.rotary, shape.sliding_rotary)
            tables = {each: self._rotary(each) for each in kinds if each is not None}
            self.rotary = tables[shape.rotary]
            self.rotaries = [
                tables[each.rotary] if shape.has_rotary(block) else None
                for block, each in enumerate(blocks)
            ]

    def _rotary(self, positions: RotaryConfig) -> Rotary:
        return Rotary(
            self.shape.rotary_size,
            self.shape.seq_len,
            positions.base,
            positions.scaling,
            dtype=self.compute_dtype,
            device=self._build.device,
            kernels=self._build.kernels,
        )

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
        cache: KVCache | None = None,
        bounds: DocumentBounds | None = None,
        row_weights: Tensor | None = None,
        score: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The sum of all losses and the loss of every token, or logits when there are no targets.

        tokens, targets: int64 [batch, seq], seq up to shape.seq_len; targets may hold
        IGNORED_TARGET. documents: int64 [batch, seq], ascending along a row; where they are given,
        a token sees those of its own document alone; bounds: of these documents, see
        `attend_within`. dropout_seeds: int64 [batch], see `dropout.row_seeds`; nothing is dropped
        where they are missing. row_weights: fp32 [batch], by which the losses of each row are
        multiplied in the sum. Returns nats, fp32 [] and [batch, seq] with 0 at ignored targets, of
        which the sum alone has a gradient, and where one is wanted also the z-loss; or logits
        [batch, seq, vocabulary of this rank].

        cache: the tokens follow those that it holds, and are added to it. Returns the logits of the
        last token alone, [batch, vocabulary], of the whole vocabulary on every rank.

        score: return what `score_targets` does, the log-probability of every target and whether it
        is the most likely token; without gradients.

        With either, sequences are whole on every rank (`TensorRegion.with_whole_sequences`).
        """
        cached = None if cache is None else cache.append(tokens.shape[1])
        x = self.embedding_dropout(self._embed(tokens, documents, cached), dropout_seeds)
        halves = 2 if self.overlap and len(tokens) > 1 and cached is None else 1
        contexts = self._contexts(tokens, documents, bounds, dropout_seeds, halves, cached)
        parts = self._halves(x, halves)
        for block, of_block in zip(self.blocks, contexts, strict=True):
            if self.shape.activation_checkpointing == "full" and self.training:
                parts = checkpoint(block, of_block, *parts, use_reentrant=False)
            else:
                parts = block(of_block, *parts)
        x = self._whole(parts)
        _, normed = self.norm(x if cached is None else x[:, -1])
        found = self.head(normed, targets, row_weights, score=score)
        return found if cached is None else self.head.gathered(found)

    def _embed(
        self, tokens: Tensor, documents: Tensor | None, cached: CachedBatch | None
    ) -> Tensor:
        x = self.embedding(tokens, self.compute_dtype)
        if self.multiplier is not None:
            x = x * self.multiplier
        if self.positions is not None:
            positions = self.region.replicated(self.positions)
            if cached is not None:
                positions = F.embedding(cached.positions, positions)
            elif documents is not None:
                positions = F.embedding(positions_in_document(documents), positions)
            else:
                positions = positions[: tokens.shape[1]]
            x = x + self.region.own_positions(positions).to(self.compute_dtype)
        return x

    def _halves(self, x: Tensor, halves: int) -> tuple[Tensor, ...]:
        """The rows in equal parts, each stored as a layer stores its output."""
        parts = x.chunk(halves)
        return tuple(map(sequence_first, parts)) if self.region.sequence else parts

    def _whole(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        if not self.region.sequence:
            return torch.cat(tuple(parts))
        return torch.cat([part.transpose(0, 1) for part in parts], 1).transpose(0, 1)

    def _contexts(
        self,
        tokens: Tensor,
        documents: Tensor | None,
        bounds: DocumentBounds | None,
        dropout_seeds: Tensor | None,
        parts: int,
        cached: CachedBatch | None,
    ) -> list[list[ForwardContext]]:
        """For every block, one context for each part of the rows."""
        if cached is not None:
            at = cache(lambda rotary: None if rotary is None else rotary.at(cached.positions))
            layers = zip(cached.layers, self.rotaries, strict=True)
            return [[ForwardContext(layer.attend, at(rotary))] for layer, rotary in layers]
        seeds = [None] * parts if dropout_seeds is None else dropout_seeds.chunk(parts)
        attends = {
            rule: self._attends(rule, tokens.chunk(parts), documents, bounds)
            for rule in dict.fromkeys(self.rules)
        }

        @cache
        def of_kind(rule: AttentionRule, rotary: Rotary | None) -> list[ForwardContext]:
            return [ForwardContext(f, rotary, s) for f, s in zip(attends[rule], seeds, strict=True)]

        return [of_kind(*kind) for kind in zip(self.rules, self.rotaries, strict=True)]

    def _attends(
        self,
        rule: AttentionRule,
        parts: Sequence[Tensor],
        documents: Tensor | None,
        bounds: DocumentBounds | None,
    ) -> list[AttentionFn]:
        """The attention of each part of the rows, in blocks with this rule."""
        if documents is None:
            return [attend_before(part, self.compute_dtype, rule) for part in parts]
        of_parts = [None] * len(parts) if bounds is None else bounds.chunk(len(parts))
        return [
            attend_within(part, self.compute_dtype, of_part, rule)
            for part, of_part in zip(documents.chunk(len(parts)), of_parts, strict=True)
        ]

    def saved(self, rank: Rank) -> Mapping[str, int]:
        """Before the blocks; blocks with the same rule share a mask, one byte for each pair of
        tokens."""
        masks = [attention_mask_rows(rank, rule) for rule in dict.fromkeys(self.rules)]
        return {
            "dropout": self.embedding_dropout.saved_bytes(rank, self.shape.hidden),
            "masks": sum(masks) * self.shape.seq_len,
        }


def _norm(shape: GPTShape, build: LayerBuilder, **options: bool) -> RMSNorm | LayerNorm:
    options["zero_centered"] = bool(shape.zero_centered_norms)
    return NORMS[shape.norm](shape.hidden, shape.norm_eps, build, **options)


def _block_norm(shape: GPTShape, build: LayerBuilder, **options: bool) -> RMSNorm | LayerNorm:
    recomputed = shape.activation_checkpointing == "selective"
    return _norm(shape, build, recomputed=recomputed, **options)


def _post_norm(shape: GPTShape, build: LayerBuilder) -> RMSNorm | LayerNorm:
    return _norm(shape, build, adds=False)


def _no_norm(shape: GPTShape, build: LayerBuilder, **options: bool) -> None:
    return None


def _dropout(shape: GPTShape, build: LayerBuilder) -> Dropout:
    return Dropout(shape.dropout, build.path, build.region)
