"""Linear layers, embedding and norms whose weights are spread over the tensor-parallel group.

Sharded parameters carry `model_parallel` and `tensor_model_parallel` (DeepSpeed counts replicated
ones once in the gradient norm) and `parallel_layout`, which says how they were cut.
Weights are cast to the activations' type when they are used, so fp32 masters may stay in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megaphase.distributed.column_linear import start_column_parallel_linear
from megaphase.distributed.cross_entropy import Vocabulary, linear_cross_entropy, tokens_at_a_time
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import ProcessGrid, device
from megaphase.distributed.sharding import ParameterLayout, padded_vocab, vocab_rows
from megaphase.distributed.tensor_region import TensorRegion
from megaphase.ops.kernels import Kernels
from megaphase.ops.layer_norm import layer_norm
from megaphase.ops.matmul import linear
from megaphase.ops.rms_norm import add_and_rms_norm, rms_norm


def sharded_parameter(
    whole: Tensor, dim: int, segments: Sequence[int], grid: ProcessGrid
) -> nn.Parameter:
    """The rank's shard of `whole` as a parameter that knows how it was cut.

    segments: sizes along `dim` of what is cut one by one; they may sum to more than `whole` has,
    which is then padded with zeros.
    """
    layout = ParameterLayout(tuple(whole.shape), dim, tuple(segments))
    part = layout.cut(whole, grid.tensor_rank, grid.tensor_size)
    parameter = nn.Parameter(part.to(device()))
    parameter.tensor_model_parallel = parameter.model_parallel = grid.tensor_size > 1  # type: ignore[attr-defined]
    parameter.parallel_layout = layout  # type: ignore[attr-defined]
    return parameter


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with the rows of W [sum(segments), inputs] sharded, each segment on its own.

    The input is as outside of the tensor-parallel region; output [..., sum(segments) / tensor].
    """

    def __init__(
        self,
        inputs: int,
        segments: Sequence[int],
        *,
        bias: bool,
        std: float,
        init: Initializer,
        region: TensorRegion,
    ) -> None:
        super().__init__()
        self.region = region
        outputs = sum(segments)
        whole = init.normal("weight", (outputs, inputs), std)
        self.weight = sharded_parameter(whole, 0, segments, region.grid)
        self.bias = None
        if bias:
            zeros = init.constant((outputs,), 0.0)
            self.bias = sharded_parameter(zeros, 0, segments, region.grid)

    def start(self, x: Tensor) -> Callable[[], Tensor]:
        """Send for what the other ranks hold of x; what then computes y."""
        region, weight = self.region, self.region.cast(self.weight, x.dtype)
        product = start_column_parallel_linear(x, weight, region.grid, region.sequence)
        return lambda: product() if self.bias is None else product() + self.bias.to(x.dtype)


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with the columns of W [outputs, inputs] sharded.

    Input [..., inputs / tensor]; the ranks' partial results are summed on the way out.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        std: float,
        init: Initializer,
        region: TensorRegion,
    ) -> None:
        super().__init__()
        self.region = region
        whole = init.normal("weight", (outputs, inputs), std)
        self.weight = sharded_parameter(whole, 1, (inputs,), region.grid)
        self.bias = nn.Parameter(init.constant((outputs,), 0.0).to(device())) if bias else None

    def start(self, x: Tensor) -> Callable[[], Tensor]:
        """Compute this rank's part of y and send it off; what then waits for y."""
        product = linear(x, self.region.cast(self.weight, x.dtype))
        sum_ = self.region.reduce_async(product)
        return lambda: sum_() if self.bias is None else sum_() + self._whole_bias().to(x.dtype)

    def _whole_bias(self) -> Tensor:
        assert self.bias is not None
        return self.region.replicated(self.bias)


def vocab_parallel_weight(
    vocab: int, hidden: int, std: float, init: Initializer, grid: ProcessGrid
) -> nn.Parameter:
    """[vocab, hidden] with its rows sharded; rows that only pad are zero and never used."""
    whole = init.normal("weight", (vocab, hidden), std)
    padded = padded_vocab(vocab, grid.tensor_size)
    return sharded_parameter(whole, 0, (padded,), grid)


class VocabParallelEmbedding(nn.Module):
    """Token embedding, rows sharded: each rank looks up its own tokens, the sum is whole."""

    def __init__(
        self, vocab: int, hidden: int, *, std: float, init: Initializer, region: TensorRegion
    ) -> None:
        super().__init__()
        self.region = region
        self.weight = vocab_parallel_weight(vocab, hidden, std, init, region.grid)
        self.rows = vocab_rows(vocab, region.grid.tensor_size)
        self.first_row = self.rows * region.grid.tensor_rank

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [batch, seq] -> [batch, seq (/ tensor), hidden]."""
        if self.region.grid.tensor_size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first_row
        elsewhere = (local < 0) | (local >= self.rows)
        vectors = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.region.reduce_async(vectors.masked_fill(elsewhere.unsqueeze(-1), 0))()


class VocabParallelHead(nn.Module):
    """Output projection: logits over the rank's own part of the vocabulary, or their losses.

    The input is as outside of the tensor-parallel region. Rows that only pad are left out.
    """

    def __init__(
        self, vocab: int, weight: nn.Parameter, region: TensorRegion, ignored: int, kernels: Kernels
    ) -> None:
        """ignored: the target of tokens without a loss."""
        super().__init__()
        self.weight, self.region = weight, region
        grid = region.grid
        rows = vocab_rows(vocab, grid.tensor_size)
        first = rows * grid.tensor_rank
        self.real_rows = max(0, min(rows, vocab - first))
        self.padded = self.real_rows < rows
        self.vocabulary = Vocabulary(
            first, ignored, grid, kernels, tokens_at_a_time(rows, device())
        )

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [batch, seq, real rows of this rank]; with targets, see `linear_cross_entropy`."""
        x = self.region.enter(x)
        weight = self.weight[: self.real_rows] if self.padded else self.weight
        if targets is None:
            return linear(x, weight.to(x.dtype))
        return linear_cross_entropy(x, weight, targets, self.vocabulary)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) over the hidden dimension."""

    def __init__(
        self, hidden: int, eps: float, init: Initializer, region: TensorRegion, kernels: Kernels
    ) -> None:
        super().__init__()
        self.region, self.eps, self.kernels = region, eps, kernels
        self.weight = nn.Parameter(init.constant((hidden,), 1.0).to(device()))

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, plus what is added to it, and that normed."""
        weight = self.region.replicated(self.weight)
        return add_and_rms_norm(x, added, weight, self.eps, self.kernels)

    def again(self, x: Tensor) -> Callable[[], Tensor]:
        """What computes the normed x once more, without autograd."""
        return partial(rms_norm, x.detach(), self.weight, self.eps, self.kernels)


class LayerNorm(nn.Module):
    """Layer norm (Ba, Kiros and Hinton 2016) over the hidden dimension."""

    def __init__(
        self, hidden: int, eps: float, init: Initializer, region: TensorRegion, kernels: Kernels
    ) -> None:
        super().__init__()
        self.region, self.eps, self.kernels = region, eps, kernels
        self.weight = nn.Parameter(init.constant((hidden,), 1.0).to(device()))
        self.bias = nn.Parameter(init.constant((hidden,), 0.0).to(device()))

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, plus what is added to it, and that normed."""
        weight, bias = (self.region.replicated(each) for each in (self.weight, self.bias))
        total = x if added is None else x + added
        return total, layer_norm(total, weight, bias, self.eps, self.kernels)

    def again(self, x: Tensor) -> Callable[[], Tensor]:
        """What computes the normed x once more, without autograd."""
        return partial(layer_norm, x.detach(), self.weight, self.bias, self.eps, self.kernels)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
