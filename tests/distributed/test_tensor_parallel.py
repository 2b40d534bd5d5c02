"""Tensor-parallel parts on four real processes compared with a single process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from distributed import once, run_ranks
from engine_support import build_engine, global_batch, model_weights, run_config
from plain_gpt import PlainGPT, PlainShape
from rounding import FP32_ROUNDOFF, assert_close
from torch import Tensor

from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.collectives import (
    copy_to_tensor_parallel,
    gather_sequence,
    reduce_async,
)
from megaphase.distributed.cross_entropy import Vocabulary, linear_cross_entropy
from megaphase.distributed.process_grid import ProcessGrid, start_process_grid
from megaphase.distributed.sharding import layout_of
from megaphase.ops.kernels import EAGER
from megaphase.training.engine import Engine
from megaphase.utils.targets import IGNORED_TARGET

PROCESSES = 4
TENSOR_SIZES = (1, 2, 4)
BATCH, SEQ, HIDDEN = 2, 8, 3

# Everything that could be sharded wrongly: grouped queries, a gate, biases, a vocabulary not
# divisible by 2 or 4.
MODEL = {
    "layers": 2,
    "hidden": 32,
    "heads": 8,
    "kv_heads": 4,
    "ffn": 48,
    "bias": True,
    "position": "learned",
}
VOCAB = 97
SHAPE = PlainShape(layers=2, heads=8, kv_heads=4)
# Of a vocabulary of 5, four ranks hold 2, 2, 1 and no tokens.
VOCABULARIES = (5, 11, 96)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Shard:
    values: Tensor
    dim: int | None
    segments: tuple[int, ...]


@dataclass(frozen=True)
class RankResults:
    """The results of one rank, by tensor-parallel size and by variant."""

    weights: dict[tuple[int, int], dict[str, Shard]]
    logits: dict[int, Tensor]
    collectives: dict[tuple[int, str], tuple[Tensor, Tensor]]
    cross_entropy: dict[tuple[int, int, torch.dtype], FoundLosses]


def examine() -> RankResults:
    """Run on a rank."""
    results = RankResults({}, {}, {}, {})
    with process_group():
        for size in TENSOR_SIZES:
            for zero in (0, 3):
                _examine_model(size, zero, results)
            grid = start_process_grid(size)
            if size > 1:
                for name in COLLECTIVES:
                    results.collectives[size, name] = _run_collective(name, grid)
            for vocab in VOCABULARIES:
                for dtype in (torch.float32, torch.bfloat16):
                    found = _run_cross_entropy(vocab, dtype, grid)
                    results.cross_entropy[size, vocab, dtype] = found
        return results


@once
def by_rank() -> list[RankResults]:
    return run_ranks(examine, PROCESSES)


def tensor_ranks(size: int) -> list[RankResults]:
    """Return the ranks of the first tensor-parallel group."""
    return by_rank()[:size]


# Initial weights.


def _examine_model(size: int, zero: int, results: RankResults) -> None:
    engine = build_engine(run_config(model=MODEL, micro=2, tensor=size, zero=zero), VOCAB)
    results.weights[size, zero] = _shards(engine)
    if zero == 0:
        with torch.no_grad():
            results.logits[size] = engine.module(global_batch(0, vocab=VOCAB).inputs)


def _shards(engine: Engine) -> dict[str, Shard]:
    parameters = dict(engine.module.named_parameters())
    layouts = {name: layout_of(parameter) for name, parameter in parameters.items()}
    return {
        name: Shard(values, layouts[name].dim, layouts[name].segments)
        for name, values in model_weights(engine).items()
    }


def reassembled(shards: list[Shard]) -> Tensor:
    """Return the whole parameter from the shards of all tensor-parallel ranks."""
    if shards[0].dim is None:
        assert all(torch.equal(each.values, shards[0].values) for each in shards)
        return shards[0].values
    dim, ranks = shards[0].dim, len(shards)
    pieces = []
    done = 0
    for segment in shards[0].segments:
        rows = segment // ranks
        pieces += [each.values.narrow(dim, done, rows) for each in shards]
        done += rows
    assert done == shards[0].values.shape[dim]
    return torch.cat(pieces, dim)


def whole_weights(size: int, zero: int) -> dict[str, Tensor]:
    shards = [rank.weights[size, zero] for rank in tensor_ranks(size)]
    whole = {name: reassembled([each[name] for each in shards]) for name in shards[0]}
    for name in ("embedding.weight", "head.weight"):
        assert not whole[name][VOCAB:].any()
        whole[name] = whole[name][:VOCAB]
    return whole


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("size", TENSOR_SIZES)
def test_initial_weights_do_not_depend_on_the_layout(size: int, zero: int) -> None:
    expected, found = whole_weights(1, 0), whole_weights(size, zero)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.distributed
@pytest.mark.parametrize("size", TENSOR_SIZES)
def test_data_parallel_replicas_start_equal(size: int) -> None:
    for zero in (0, 3):
        for number, rank in enumerate(by_rank()):
            twin = by_rank()[number % size].weights[size, zero]
            for name, shard in rank.weights[size, zero].items():
                assert torch.equal(shard.values, twin[name].values), name


@pytest.mark.distributed
def test_initial_weights_are_drawn_as_said() -> None:
    weights = whole_weights(1, 0)
    for name, weight in weights.items():
        if name.endswith("bias"):
            assert not weight.any()
        elif "norm" in name:
            assert bool((weight == 1).all())
        else:
            writes_to_stream = name.endswith(("out.weight", "down.weight"))
            std = 0.02 / 2 if writes_to_stream else 0.02  # √(2 · 2 layers) = 2
            assert float(weight.std()) == pytest.approx(std, rel=0.1), name
            assert abs(float(weight.mean())) < 5 * std / weight.numel() ** 0.5
    first, second = (weights[f"blocks.{i}.attention.qkv.weight"] for i in range(2))
    assert not torch.equal(first, second)


@pytest.mark.distributed
@pytest.mark.parametrize("size", TENSOR_SIZES)
def test_logits_cover_the_vocabulary_and_no_padding(size: int) -> None:
    expected = PlainGPT(whole_weights(1, 0), SHAPE).logits(global_batch(0, vocab=VOCAB).inputs)
    found = torch.cat([rank.logits[size] for rank in tensor_ranks(size)], -1)
    assert found.shape[-1] == VOCAB
    assert_close(found, expected)


# Collectives. Each is given with the inputs of the ranks and a scalar that its outputs go into;
# the gradients must be those of that scalar, computed in one process from all inputs.


@dataclass(frozen=True)
class Collective:
    """whole(inputs of all ranks) returns the outputs expected on the ranks.

    replicated: the input, or the output, is one tensor that every rank has.
    """

    run: Callable[[Tensor, ProcessGrid], Tensor]
    whole: Callable[[list[Tensor]], list[Tensor]]
    replicated_input: bool = False
    replicated_output: bool = False
    input_seq: int = SEQ


COLLECTIVES = {
    "copy": Collective(
        lambda x, grid: copy_to_tensor_parallel([x], grid)[0],
        lambda xs: [xs[0] for _ in xs],
        replicated_input=True,
    ),
    "reduce": Collective(
        lambda x, grid: reduce_async(x.clone(), grid, False)(),
        lambda xs: [torch.stack(xs).sum(0)] * len(xs),
        replicated_output=True,
    ),
    "gather": Collective(gather_sequence, lambda xs: [torch.cat(xs, 1) for _ in xs]),
    "reduce_scatter": Collective(
        lambda x, grid: reduce_async(x.clone(), grid, True)(),
        lambda xs: list(torch.stack(xs).sum(0).chunk(len(xs), 1)),
    ),
}


def _input(collective: Collective, rank: int) -> Tensor:
    seed = 0 if collective.replicated_input else rank
    return normal(BATCH, SEQ, HIDDEN, seed=seed).requires_grad_()


def _score(output: Tensor, collective: Collective, rank: int) -> Tensor:
    """Return a scalar of one rank's output; ranks with a common tensor compute the same."""
    seed = 100 if collective.replicated_output else 100 + rank
    return (output**2 * normal(*output.shape, seed=seed)).sum()


def _run_collective(name: str, grid: ProcessGrid) -> tuple[Tensor, Tensor]:
    collective = COLLECTIVES[name]
    x = _input(collective, grid.tensor_rank)
    y = collective.run(x, grid)
    _score(y, collective, grid.tensor_rank).backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collective_and_its_gradient(name: str, size: int) -> None:
    collective = COLLECTIVES[name]
    inputs = [_input(collective, rank) for rank in range(size)]
    if collective.replicated_input:
        inputs = [inputs[0]] * size
    outputs = collective.whole(inputs)
    scores = [_score(output, collective, rank) for rank, output in enumerate(outputs)]
    total = scores[0] if collective.replicated_output else torch.stack(scores).sum()
    total.backward()
    for rank in range(PROCESSES):
        output, gradient = by_rank()[rank].collectives[size, name]
        assert_close(output, outputs[rank % size].detach())
        assert_close(gradient, inputs[rank % size].grad)


# Output projection and cross entropy. The gradient of the input is that of one rank's logits; the
# sum over the ranks is what the whole vocabulary gives.

SCALE = 0.3  # of the sum of losses, as the engine weighs it
TOKENS_AT_A_TIME = 5  # of BATCH * SEQ = 16: the last ones are fewer


def _hidden(dtype: torch.dtype) -> Tensor:
    """Return values so large that exponentials of logits overflow without subtracting the
    largest."""
    return (60 * normal(BATCH, SEQ, HIDDEN, seed=1)).to(dtype)


def _vocabulary_weight(vocab: int, dtype: torch.dtype) -> Tensor:
    return normal(vocab, HIDDEN, seed=vocab).to(dtype)


def _targets(vocab: int) -> Tensor:
    targets = torch.arange(BATCH * SEQ).view(BATCH, SEQ) % vocab
    targets[0, 3] = targets[1, -1] = IGNORED_TARGET
    return targets


@dataclass(frozen=True)
class FoundLosses:
    total: Tensor
    losses: Tensor
    x_gradient: Tensor
    weight_gradient: Tensor


def _run_cross_entropy(vocab: int, dtype: torch.dtype, grid: ProcessGrid) -> FoundLosses:
    rows = -(-vocab // grid.tensor_size)
    first = rows * grid.tensor_rank
    x = _hidden(dtype).requires_grad_()
    weight = _vocabulary_weight(vocab, dtype)[first : first + rows].clone().requires_grad_()
    part = Vocabulary(first, IGNORED_TARGET, grid, EAGER, TOKENS_AT_A_TIME)
    total, losses = linear_cross_entropy(x, weight, _targets(vocab), part)
    assert total.requires_grad
    assert not losses.requires_grad
    (SCALE * total).backward()
    assert x.grad is not None
    assert weight.grad is not None
    with torch.no_grad():
        measured = linear_cross_entropy(x, weight, _targets(vocab), part)
    assert torch.equal(torch.stack([total, losses.sum()]), torch.stack([measured[0], total]))
    return FoundLosses(total.detach(), losses, x.grad, weight.grad)


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("size", TENSOR_SIZES)
def test_cross_entropy_is_torchs(size: int, vocab: int, dtype: torch.dtype) -> None:
    x = _hidden(dtype).double().requires_grad_()
    weight = _vocabulary_weight(vocab, dtype).double().requires_grad_()
    logits = x @ weight.T
    expected = F.cross_entropy(
        logits.flatten(0, 1),
        _targets(vocab).flatten(),
        ignore_index=IGNORED_TARGET,
        reduction="none",
    ).view(BATCH, SEQ)
    (SCALE * expected.sum()).backward()

    found = [rank.cross_entropy[size, vocab, dtype] for rank in tensor_ranks(size)]
    bf16 = dtype == torch.bfloat16
    # A loss is a difference of logits. Those of bf16 are rounded: half a unit of their last place,
    # at the largest of them; those of fp32 are sums of HIDDEN products.
    largest = float(logits.detach().abs().max())
    tolerance = largest * (2**-9 if bf16 else HIDDEN * FP32_ROUNDOFF)
    for each in found:
        assert each.losses.dtype == each.total.dtype == torch.float32
        assert each.x_gradient.dtype == each.weight_gradient.dtype == dtype
        assert (each.losses.double() - expected.detach()).abs().max() <= 2 * tolerance
    if bf16:
        return  # if the largest logits are close, rounding one changes all
    for_x = torch.stack([each.x_gradient for each in found]).sum(0).double()
    for_weight = torch.cat([each.weight_gradient for each in found]).double()
    # An error in a logit is one of its probability, relative.
    assert_close(for_x, x.grad, tolerance)
    assert_close(for_weight, weight.grad, tolerance)
