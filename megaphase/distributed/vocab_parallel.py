"""Token embedding and output projection, whose rows are sharded over the tensor-parallel group."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megaphase.distributed.cross_entropy import Vocabulary, linear_cross_entropy, tokens_at_a_time
from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.parameter_spec import Normal, ParameterSpec
from megaphase.distributed.sharding import vocab_rows
from megaphase.ops.matmul import linear


def _weight(vocab: int, hidden: int, std: float) -> ParameterSpec:
    """[vocab, hidden]; the rows of padding are zero and never used."""
    return ParameterSpec((vocab, hidden), Normal(std), dim=0, padded=True)


class VocabParallelEmbedding(nn.Module):
    """Token embedding: each rank looks up the tokens whose rows it holds, and these are summed."""

    def __init__(self, vocab: int, hidden: int, *, std: float, build: LayerBuilder) -> None:
        super().__init__()
        self.region = build.region
        self.weight = build.parameter("weight", _weight(vocab, hidden, std))
        self.rows = vocab_rows(vocab, build.region.grid.tensor_size)
        self.first_row = self.rows * build.region.grid.tensor_rank

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [batch, seq] -> [batch, seq (/ tensor), hidden]."""
        if self.region.grid.tensor_size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first_row
        elsewhere = (local < 0) | (local >= self.rows)
        vectors = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.region.reduce_async(vectors.masked_fill(elsewhere.unsqueeze(-1), 0))()


class VocabParallelHead(nn.Module):
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
    ) -> None:
        """ignored: the target of tokens without a loss. tied_to: the embedding's weight, where the
        projection has none of its own."""
        super().__init__()
        self.region, grid = build.region, build.region.grid
        if tied_to is None:
            tied_to = build.parameter("weight", _weight(vocab, hidden, std))
        self.weight = tied_to
        rows = vocab_rows(vocab, grid.tensor_size)
        first = rows * grid.tensor_rank
        self.real_rows = max(0, min(rows, vocab - first))
        self.padded = self.real_rows < rows
        self.vocabulary = Vocabulary(
            first, ignored, grid, build.kernels, tokens_at_a_time(rows, build.device)
        )

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [batch, seq, real rows of this rank]; with targets, see `linear_cross_entropy`."""
        x = self.region.enter(x)
        weight = self.weight[: self.real_rows] if self.padded else self.weight
        if targets is None:
            return linear(x, weight.to(x.dtype))
        return linear_cross_entropy(x, weight, targets, self.vocabulary)
