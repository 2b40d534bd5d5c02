"""A layer that only this file defines is trained, checkpointed, reshaped and counted.

Its output is that of attention with every head's vector multiplied by a matrix of its own.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_support import save, whole_parameters
from distributed import once, run_ranks
from engine_support import VOCAB, build_engine, fp32_weights, global_batch, run_config, share
from rounding import FP32
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megaphase.checkpoint.parameters import StoredParameters
from megaphase.convert.partition import Layout
from megaphase.convert.reshape import reshape
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.costs import Rank, Work
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.parameter_spec import Normal, ParameterSpec
from megaphase.distributed.process_grid import ProcessGrid, start_process_grid
from megaphase.estimate.flops import forward_work
from megaphase.estimate.memory import MemoryEstimate, estimate
from megaphase.estimate.setup import Setup
from megaphase.model import parameters
from megaphase.model.attention import Attention
from megaphase.model.forward_context import ForwardContext
from megaphase.model.gpt import GPT, Block
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.training.engine import Engine

LAYERS, HIDDEN, HEADS, HEAD_DIM = 2, 32, 4, 8
SHAPE = GPTShape(
    vocab=97, seq_len=16, layers=LAYERS, hidden=HIDDEN, heads=HEADS, kv_heads=2, ffn=48
)
ELEMENTS = LAYERS * HEADS * HEAD_DIM * HEAD_DIM
ONE = Layout(tensor=1, data=1, zero=0)
TWO = Layout(tensor=2, data=1, zero=1)
BEFORE, AFTER = 3, 4
RATE = 1e-2
ALONE = ProcessGrid(1, 0, 1, None, None)  # type: ignore[arg-type]  # one process needs no groups


class MixingAttention(Attention):
    def __init__(self, shape: GPTShape, build: LayerBuilder) -> None:
        super().__init__(shape, build)
        size = (shape.heads, shape.head_size, shape.head_size)
        self.mix = build.parameter("mix", ParameterSpec(size, Normal(0.5), dim=0))

    def attend(self, qkv: Tensor, context: ForwardContext) -> Tensor:
        heads = super().attend(qkv, context).unflatten(-1, (-1, self.head_dim))
        return torch.einsum("bshd,hde->bshe", heads, self.mix.to(heads.dtype)).flatten(2)

    def flops_per_token(self, seq_len: int) -> int:
        return super().flops_per_token(seq_len) + 2 * self.shape.hidden * self.head_dim

    def forward_work(self, rank: Rank) -> Work:
        flops = 2 * rank.tokens * self.shape.hidden * self.head_dim / rank.tensor
        return super().forward_work(rank) + Work(flops)

    def saved(self, rank: Rank) -> Mapping[str, int]:
        unmixed = rank.tokens * self.shape.hidden // rank.tensor * rank.compute_bytes
        return {**super().saved(rank), "unmixed": unmixed}


def forget() -> None:
    """Empty the caches of what is known of a shape."""
    parameters.declared_model.cache_clear()
    parameters.parameter_specs.cache_clear()
    parameters.parameter_sizes.cache_clear()
    estimate.cache_clear()


@contextmanager
def mixing() -> Iterator[None]:
    """Models have the layer within."""
    forget()
    Block.attention_layer = MixingAttention
    try:
        yield
    finally:
        Block.attention_layer = Attention
        forget()


def build(shape: GPTShape = SHAPE) -> GPT:
    with mixing():
        return GPT(shape, Initializer(1, torch.float32), ALONE)


def of_both(setup: Setup) -> tuple[MemoryEstimate, MemoryEstimate]:
    """The estimate without the layer, and with it."""
    plain = estimate(setup)
    with mixing():
        return plain, estimate(setup)


# The formula and its parameter.


def test_the_parameter_is_listed_as_it_is_built() -> None:
    with mixing():
        specs = parameters.parameter_specs(SHAPE)
        assert parameters.parameter_count(SHAPE) == sum(p.numel() for p in build().parameters())
    found = {name: spec for name, spec in specs.items() if name.endswith("mix")}
    assert list(found) == [f"blocks.{i}.attention.mix" for i in range(LAYERS)]
    assert sum(spec.numel for spec in found.values()) == ELEMENTS
    assert parameters.parameter_specs(SHAPE).keys() == specs.keys() - found.keys()


def test_its_gradient_is_the_slope_of_the_loss() -> None:
    # RMSNorm computes in fp32 whatever the type.
    model, batch = (
        build(replace(SHAPE, norm="layernorm")).double(),
        global_batch(0, vocab=SHAPE.vocab),
    )
    model.compute_dtype = torch.float64
    assert model.rotary is not None
    model.rotary._cos, model.rotary._sin = model.rotary._cos.double(), model.rotary._sin.double()
    weight = dict(model.named_parameters())["blocks.1.attention.mix"]

    def loss() -> Tensor:
        found = model(batch.inputs)
        return torch.nn.functional.cross_entropy(
            found.flatten(0, 1), batch.targets.flatten(), reduction="sum"
        )

    loss().backward()
    assert weight.grad is not None
    step = 1e-5
    for place in ((0, 0, 0), (3, 2, 7), (1, 7, 4)):
        values = []
        for change in (step, -2 * step):
            with torch.no_grad():
                weight[place] += change
                values.append(float(loss()))
        with torch.no_grad():
            weight[place] += step
        slope = (values[0] - values[1]) / (2 * step)
        assert float(weight.grad[place]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


# What it costs.


def test_its_flops_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        build()(torch.zeros((1, SHAPE.seq_len), dtype=torch.int64))
    plain = GPT(SHAPE, Initializer(1, torch.float32), ALONE)
    with FlopCounterMode(display=False) as plain_counter:
        plain(torch.zeros((1, SHAPE.seq_len), dtype=torch.int64))
    added = counter.get_total_flops() - plain_counter.get_total_flops()
    assert added == 2 * SHAPE.seq_len * LAYERS * HEADS * HEAD_DIM * HEAD_DIM
    before = parameters.train_flops_per_token(SHAPE)
    with mixing():
        after = parameters.train_flops_per_token(SHAPE)
    assert (after - before) * SHAPE.seq_len == 3 * added


def test_its_work_is_shared_by_tensor_parallel_ranks() -> None:
    setup = Setup(SHAPE, 2, 1, 0, False, False, micro=3, accumulation=1)
    before = forward_work(setup).matrices
    with mixing():
        after = forward_work(setup).matrices
    assert after - before == 2 * 3 * SHAPE.seq_len * ELEMENTS / 2


@pytest.mark.parametrize("tensor", [1, 2])
def test_its_memory_is_counted(tensor: int) -> None:
    shape = replace(SHAPE, seq_len=1024)
    setup = Setup(shape, tensor, 1, 0, False, False, micro=4, accumulation=2)
    plain, mixed = of_both(setup)
    assert mixed.moment == plain.moment == "loss"
    added = {part: mixed.parts[part] - plain.parts[part] for part in plain.parts}
    parameter_bytes = 4 * ELEMENTS // tensor
    assert added == {
        "weights": parameter_bytes,
        "masters": 0,
        "moments": 2 * parameter_bytes,
        "gradients": parameter_bytes,
        "activations": LAYERS * 4 * 4 * 1024 * HIDDEN // tensor,
        "gathered": 0,
        "buffers": 0,
    }


# Training, checkpoints and reshaping.


def train(engine: Engine, first: int, steps: int) -> list[float]:
    batches = (share(global_batch(first + i), engine.grid) for i in range(steps))
    return [engine.train_step(batch, RATE).losses.mean for batch in batches]


def begin(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Train on one process and save; the weights at first and then, and the curve after that."""
    with process_group(), mixing():
        start_process_grid(1)
        config = run_config(model={"kv_heads": 2}, tensor=1, zero=0)
        engine = build_engine(config)
        first = fp32_weights(engine)
        train(engine, 0, BEFORE)
        save(engine, config, VOCAB, Path(folder, "begin"), ControlGroup())
        return first, fp32_weights(engine), train(engine, BEFORE, AFTER)


def resume(folder: str) -> list[float]:
    with process_group(), mixing():
        start_process_grid(2)
        engine = build_engine(run_config(model={"kv_heads": 2}, tensor=2, zero=1))
        engine.state.load(StoredParameters(Path(folder, "reshaped")), BEFORE)
        return train(engine, BEFORE, AFTER)


@once
def trained() -> tuple[str, dict[str, Tensor], dict[str, Tensor], list[float], list[float]]:
    folder = tempfile.mkdtemp(prefix="megaphase-toy-")
    first, weights, curve = run_ranks(begin, 1, folder)[0]
    with mixing():
        source = Path(folder, "begin", "step-00000001")
        reshape(str(source), Path(folder, "reshaped"), TWO, weights_only=False, workers=1)
    return folder, first, weights, curve, run_ranks(resume, 2, folder)[0]


@pytest.fixture(scope="module", autouse=True)
def removed_at_the_end() -> Iterator[None]:
    yield
    shutil.rmtree(trained()[0])


@pytest.mark.distributed
def test_it_is_trained_and_decays() -> None:
    _, first, weights, _, _ = trained()
    with mixing():
        shape = build_shape(run_config(model={"kv_heads": 2}), VOCAB)
        specs = parameters.parameter_specs(shape)
    name = "blocks.0.attention.mix"
    assert specs[name].weight_decay
    assert (first[name] != weights[name]).all()


@pytest.mark.distributed
def test_the_checkpoint_holds_it_and_reshaping_shards_it() -> None:
    folder, _, weights, _, _ = trained()
    name = "blocks.1.attention.mix"
    source, reshaped = Path(folder, "begin", "step-00000001"), Path(folder, "reshaped")
    assert torch.equal(whole_parameters(source)[name], weights[name])
    stored = StoredParameters(reshaped)
    shards = {shard.tensor_rank: shard.pieces[name] for shard in stored.shards.values()}
    assert {rank: piece.stop for rank, piece in shards.items()} == dict.fromkeys(
        (0, 1), HEADS // 2 * HEAD_DIM * HEAD_DIM
    )
    assert torch.equal(whole_parameters(reshaped)[name], weights[name])


@pytest.mark.distributed
def test_resumed_on_two_tensor_parallel_ranks_the_curve_is_the_same() -> None:
    *_, curve, resumed = trained()
    assert resumed == pytest.approx(curve, rel=FP32)
