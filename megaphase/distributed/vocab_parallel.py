"""Token embedding and output projection, whose rows are sharded over the tensor-parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megaphase.distributed.costs import (
    BACKWARD_PRODUCTS,
    BF16_BYTES,
    FP32_BYTES,
    Collective,
    CollectiveKind,
    CostedLayer,
    Rank,
    Work,
    enter_collectives,
    leave_collectives,
    region_bytes,
    residual_bytes,
)
from megaphase.distributed.cross_entropy import (
    Vocabulary,
    linear_cross_entropy,
    score_targets,
    softcapped,
    tokens_at_a_time,
)
from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.parameter_spec import Normal, ParameterSpec
from megaphase.distributed.sharding import vocab_rows
from megaphase.ops.matmul import linear
from megaphase.ops.row_order import stored_order


def _weight(vocab: int, hidden: int, std: float) -> ParameterSpec:
    """[vocab, hidden]; the rows of padding are zero and never used."""
    return ParameterSpec((vocab, hidden), Normal(std), dim=0, padded=True)


class VocabParallelEmbedding(CostedLayer):
    """Token embedding: each rank looks up the tokens whose rows it holds, and these are summed."""

    def __init__(self, vocab: int, hidden: int, *, std: float, build: LayerBuilder) -> None:
        super().__init__()
        self.region, self.hidden = build.region, hidden
        self.weight = build.parameter("weight", _weight(vocab, hidden, std))
        self.rows = vocab_rows(vocab, build.region.grid.tensor_size)
        self.first_row = self.rows * build.region.grid.tensor_rank

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens int64 [batch, seq] -> [batch, seq (/ tensor), hidden] of dtype.

        Rounded before they are summed: all ranks but one add zeros.
        """
        if self.region.grid.tensor_size == 1:
            return F.embedding(tokens, self.weight).to(dtype)
        sequence = self.region.sequence
        local = (tokens.t() if sequence else tokens) - self.first_row
        elsewhere = (local < 0) | (local >= self.rows)
        vectors = F.embedding(local.masked_fill(elsewhere, 0), self.weight).to(dtype)
        own = vectors.masked_fill(elsewhere.unsqueeze(-1), 0)
        return self.region.reduce_async(own.transpose(0, 1) if sequence else own)()

    def forward_collectives(self, rank: Rank) -> Sequence[Collective]:
        return leave_collectives(rank, self.hidden)

    def backward_collectives(self, rank: Rank) -> Sequence[Collective]:
        return enter_collectives(rank, self.hidden)


# Passes over the logits: maximum, sum and gradient read them, and the gradient is written.
_LOGIT_PASSES = 4
# fp32 values that the cross entropy reduces for each token: the largest logit; the sum of
# exponentials and the target's logit.
_LOSS_VALUES = (1, 2)
_INDEX_BYTES = 8


@dataclass(frozen=True)
class LossMemory:
    """Bytes beside the saved activations. loss: in the forward pass; backward: in the backward
    pass."""

    loss: int
    backward: int


class VocabParallelHead(CostedLayer):
    """Output projection: logits over this rank's part of the vocabulary, or the losses.

    The input is as outside of the tensor-parallel region. Rows of padding give no logits.
    """

    def __init__(
        self,
        vocab: int,
        hidden: int,
        *,
        std: float,
        ignored: int,
        tied_to: nn.Parameter | None,
        build: LayerBuilder,
        softcap: float | None = None,
        z_loss: float | None = None,
    ) -> None:
        """ignored: the target of tokens without a loss. tied_to: the embedding's weight, where the
        projection has none of its own. softcap, z_loss: see `cross_entropy.Vocabulary`."""
        super().__init__()
        self.region, grid = build.region, build.region.grid
        self.vocab, self.hidden = vocab, hidden
        if tied_to is None:
            tied_to = build.parameter("weight", _weight(vocab, hidden, std))
        self.weight = tied_to
        self.rows = rows = vocab_rows(vocab, grid.tensor_size)
        first = rows * grid.tensor_rank
        self.real_rows = max(0, min(rows, vocab - first))
        self.padded = self.real_rows < rows
        part = tokens_at_a_time(rows, build.device)
        self.vocabulary = Vocabulary(first, ignored, grid, build.kernels, part, softcap, z_loss)

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None,
        row_weights: Tensor | None = None,
        *,
        score: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [batch, seq, real rows of this rank]; with targets, see `linear_cross_entropy` or,
        with `score`, `score_targets`.

        row_weights: fp32 [batch], those of the losses of each row.
        """
        x = self.region.enter(x)
        weight = self.weight[: self.real_rows] if self.padded else self.weight
        if targets is None:
            logits = linear(x, weight.to(x.dtype))
            cap = self.vocabulary.softcap
            return logits if cap is None else softcapped(logits, cap)
        if score:
            return score_targets(x, weight, targets, self.vocabulary)
        order = stored_order(x)
        if row_weights is not None:
            row_weights = order(row_weights.unsqueeze(1).expand_as(targets))
        total, losses = linear_cross_entropy(
            order(x), weight, order(targets), self.vocabulary, row_weights
        )
        return total, order(losses)

    def gathered(self, logits: Tensor) -> Tensor:
        """The logits of the whole vocabulary, [..., vocabulary], from those of every rank."""
        grid = self.region.grid
        if grid.tensor_size == 1:
            return logits
        own = F.pad(logits, (0, self.rows - self.real_rows)).contiguous()
        parts = [torch.empty_like(own) for _ in range(grid.tensor_size)]
        dist.all_gather(parts, own, group=grid.tensor_group)
        return torch.cat(parts, -1)[..., : self.vocab]

    def flops_per_token(self, seq_len: int) -> int:
        return 2 * self.vocab * self.hidden

    def forward_work(self, rank: Rank) -> Work:
        return Work(2 * rank.tokens * vocab_rows(self.vocab, rank.tensor) * self.hidden)

    def backward_work(self, rank: Rank) -> Work:
        """With the loss in both directions."""
        rows = vocab_rows(self.vocab, rank.tensor)
        loss = _LOGIT_PASSES * rank.tokens * rows * rank.compute_bytes
        return Work(self.forward_work(rank).matrices * BACKWARD_PRODUCTS, 0, loss)

    def forward_collectives(self, rank: Rank) -> Sequence[Collective]:
        return enter_collectives(rank, self.hidden)

    def backward_collectives(self, rank: Rank) -> Sequence[Collective]:
        return leave_collectives(rank, self.hidden)

    def loss_collectives(self, rank: Rank) -> Sequence[Collective]:
        """Those of the cross entropy; the backward pass has none."""
        sizes = [rank.tokens * values * FP32_BYTES for values in _LOSS_VALUES]
        return [Collective(CollectiveKind.ALL_REDUCE, size) for size in sizes]

    def loss_memory(self, rank: Rank) -> LossMemory:
        """The projection's gradients are computed with the losses, for some tokens at a time."""
        tokens, rows = rank.tokens, vocab_rows(self.vocab, rank.tensor)
        weight = rows * self.hidden
        part = min(tokens, tokens_at_a_time(rows, torch.device(rank.device)))
        logits = part * rows
        whole = region_bytes(rank, self.hidden)
        cast = weight * BF16_BYTES if rank.compute_bytes != rank.parameter_bytes else 0
        gradients = whole + weight * FP32_BYTES
        # The logits, their gradient and, unless a GPU's compiler fuses them, exponentials in fp32,
        # with another cast in bf16.
        compiled = rank.compiled and rank.device == "cuda"
        eager = 0 if compiled else FP32_BYTES * (2 if rank.bf16 else 1)
        if self.vocabulary.softcap is not None and not compiled:
            eager += FP32_BYTES  # the slopes of the cap
        loss = logits * (2 * rank.compute_bytes + eager)
        products = 0 if rank.parameter_bytes == FP32_BYTES else weight * rank.compute_bytes
        if rank.widened:
            products = FP32_BYTES * (logits + weight + part * self.hidden)
        products += 2 * logits * rank.compute_bytes  # both are still there
        per_token = tokens * (_INDEX_BYTES + 8 * FP32_BYTES)
        outside = per_token + residual_bytes(rank, self.hidden)
        gradient_copy = weight * (BF16_BYTES if rank.parameter_bytes == BF16_BYTES else 0)
        return LossMemory(
            loss=gradients + cast + max(loss, products) + whole + outside,
            backward=gradients + gradient_copy + outside,
        )
