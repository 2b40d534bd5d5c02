"""The memory of a layout, compared with real engines, and as shown by the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import once, run_ranks
from engine_support import build_engine, global_batch, run_config, share
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import FakeTokenizer, random_lengths, write_corpus, write_run
from typer.testing import CliRunner

from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.distributed.sharding import layout_of
from megaphase.estimate.activation_memory import blocks_kept
from megaphase.estimate.available_memory import lasting_bytes
from megaphase.estimate.gathered_parameters import gather_limits, reduce_bucket
from megaphase.estimate.memory import PARTS, estimate
from megaphase.estimate.setup import Setup, setup_of
from megaphase.estimate.state_memory import (
    SUB_GROUP,
    Resident,
    states_of,
)
from megaphase.estimate.suggestions import GB, RESERVE, all_kept, fits, layouts, suggestions
from megaphase.model.gpt import GPT
from megaphase.model.parameters import parameter_count, parameter_layouts, parameter_sizes
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.plan.commands import plan_app
from megaphase.utils.errors import InputError

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"
TOLERANCE = 0.1
LLAMA = GPTShape(vocab=97, seq_len=16, layers=2, hidden=32, heads=4, kv_heads=2, ffn=48)
GPT2 = replace(
    LLAMA,
    kv_heads=4,
    norm="layernorm",
    activation="gelu",
    position="learned",
    bias=True,
    tied_embeddings=True,
)
GPT_13B = GPTShape(
    vocab=50_000, seq_len=2048, layers=40, hidden=5120, heads=40, kv_heads=40, ffn=13696
)
WINDOWS = replace(
    GPT_13B, kv_heads=8, sliding_window=512, attention_pattern=("sliding", "sliding", "full")
)
CAPPED = replace(WINDOWS, attention_softcap=50.0)
BIG = Setup(
    shape=GPT_13B, tensor=2, data=4, zero=3, sequence=True, bf16=True, micro=4, accumulation=4
)


@pytest.mark.parametrize("shape", [LLAMA, GPT2])
@pytest.mark.parametrize("tensor", [1, 2])
def test_parameters_are_those_of_the_model(shape, tensor):
    grid = ProcessGrid(tensor, 0, tensor, None, None)  # type: ignore[arg-type]  # nothing travels
    model = GPT(shape, Initializer(1, torch.float32), grid)
    parameters = dict(model.named_parameters())
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    assert parameter_sizes(shape, tensor) == sizes
    layouts = {name: layout_of(parameter) for name, parameter in parameters.items()}
    assert list(parameter_layouts(shape, tensor).items()) == list(layouts.items())


def test_parameters_sum_to_the_shape_s_own_count():
    for shape in (LLAMA, GPT2, GPT_13B):
        assert sum(parameter_sizes(shape, 1).values()) == parameter_count(shape)


@dataclass(frozen=True)
class Built:
    """The bytes in an engine's tensors after a step, and the sizes of its buckets."""

    kept: Resident
    buckets: tuple[int, ...]


RUNS = [(zero, precision, "adamw") for zero in range(4) for precision in ("fp32", "bf16")] + [
    (zero, "bf16", name) for zero in range(4) for name in ["adafactor", "lion", "muon"]
]


def build(tensor: int) -> list[Built]:
    """Run on a rank: build an engine for each stage and precision, and count its bytes."""
    with process_group():
        return [_build(*run, tensor) for run in RUNS]


def _build(zero: int, precision: str, name: str, tensor: int) -> Built:
    optimizer_of_run = {"name": name}
    engine = build_engine(
        run_config(zero=zero, precision=precision, tensor=tensor, optimizer=optimizer_of_run)
    )
    engine.train_step(share(global_batch(0), engine.grid), 1e-3)
    deepspeed = engine._engine
    optimizer = deepspeed.optimizer
    masters = [p for group in engine._optimizer.param_groups for p in group["params"]]
    state = engine._optimizer.state.values()
    gradients: list[torch.Tensor] = []
    if zero == 3:
        weights = [p.ds_tensor for p in engine.module.parameters()]
        masters = optimizer.fp32_partitioned_groups_flat
        gradients = [optimizer.grad_partitions_flat_buffer]
    elif zero == 0:
        weights, masters = masters, []
    elif hasattr(optimizer, "bf16_groups_flat"):
        weights, gradients = optimizer.bf16_groups_flat, optimizer.fp32_groups_gradients_flat
    else:
        weights = optimizer.bit16_groups_flat
    kept = Resident(
        _bytes(weights),
        _bytes(masters),
        _bytes(gradients),
        _bytes([tensor for each in state for key, tensor in each.items() if key != "step"]),
    )
    buckets = (
        deepspeed.zero_reduce_bucket_size(),
        deepspeed.zero_prefetch_bucket_size(),
        deepspeed.zero_sub_group_size(),
    )
    return Built(kept, tuple(map(int, buckets)))


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@once
def built(tensor: int) -> dict[tuple[int, str, str], Built]:
    return dict(zip(RUNS, run_ranks(build, 2, tensor)[0], strict=True))


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("zero", "precision", "name"), RUNS)
def test_what_is_kept_is_what_an_engine_holds(zero, precision, name, tensor):
    config = run_config(zero=zero, precision=precision, tensor=tensor, optimizer={"name": name})
    setup = setup_of(config, build_shape(config, 96), 2, "cpu")
    assert states_of(setup).resident == built(tensor)[zero, precision, name].kept


def test_buckets_have_the_sizes_that_the_engine_gives_them():
    sizes = parameter_sizes(build_shape(run_config(), 96), 1)
    expected = (reduce_bucket(sizes), gather_limits(sizes, 0.0).prefetch, SUB_GROUP)
    assert built(1)[3, "bf16", "adamw"].buckets == expected


@pytest.mark.slow
def test_the_estimate_is_within_a_tenth_of_what_is_measured():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel does not tell the most resident memory of a process")
    command = [sys.executable, BENCHMARK, "--quick", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 3, result.stderr
    for row in rows:
        assert row["estimated"] == pytest.approx(row["measured"], rel=TOLERANCE), row["case"]


def test_the_blocks_of_a_pattern_are_counted_by_their_kind():
    """In fp32 on a GPU, windows have a mask; keys and values are repeated for all heads in any
    case."""
    setup = replace(BIG, bf16=False, sequence=False, tensor=1, device="cuda")
    shapes = [replace(GPT_13B, kv_heads=8), replace(GPT_13B, kv_heads=8, sliding_window=512)]
    full, sliding = (blocks_kept(replace(setup, shape=shape))[1] for shape in shapes)
    rows, width = setup.tokens, GPT_13B.hidden
    repeated = 4 * 2 * rows * width
    assert sliding - full == 4 * GPT_13B.seq_len**2
    ungrouped = blocks_kept(replace(setup, shape=GPT_13B))[1]
    keys = 4 * 2 * rows * (width - 8 * width // GPT_13B.heads)
    assert ungrouped - (full - repeated) == keys
    kept = blocks_kept(replace(setup, shape=WINDOWS))
    assert kept[:5] == [0, sliding, 2 * sliding, 2 * sliding + full, 3 * sliding + full]
    # FlexAttention needs neither.
    assert blocks_kept(replace(setup, shape=CAPPED))[-1] == 40 * (full - repeated)


setups = st.builds(
    Setup,
    shape=st.sampled_from([LLAMA, GPT2, GPT_13B, replace(GPT_13B, kv_heads=8), WINDOWS, CAPPED]),
    tensor=st.sampled_from([2, 4]),
    data=st.sampled_from([1, 2, 8]),
    zero=st.sampled_from([0, 1, 2, 3]),
    sequence=st.booleans(),
    bf16=st.booleans(),
    micro=st.sampled_from([2, 4]),
    accumulation=st.sampled_from([2, 8]),
    masked=st.booleans(),
    keep_gathered=st.sampled_from([0.0, 0.5, 1.0]),
    device=st.sampled_from(["cuda", "cpu"]),
)


def total(setup: Setup) -> int:
    return estimate(setup).total


@settings(max_examples=40, deadline=None)
@given(setups)
def test_less_work_never_needs_more(setup):
    shape, here = setup.shape, total(setup)
    assert total(setup.with_micro(setup.micro // 2)) <= here
    assert total(replace(setup, shape=replace(shape, layers=shape.layers - 1))) <= here
    assert total(replace(setup, shape=replace(shape, seq_len=shape.seq_len // 2))) <= here
    assert total(replace(setup, masked=False)) <= here
    if not setup.sequence:
        narrower = setup.with_processes(2 * setup.tensor, setup.data)
        assert total(narrower) <= here


@settings(max_examples=40, deadline=None)
@given(setups)
def test_the_parts_are_named_and_none_is_negative(setup):
    for offload in ("none", "cpu"):
        found = estimate(replace(setup, zero=3, offload=offload))
        assert tuple(found.parts) == PARTS
        assert min(found.parts.values()) >= 0


@settings(max_examples=40, deadline=None)
@given(setups.filter(lambda setup: setup.shape.layers > 2))
def test_computing_blocks_again_saves_memory(setup):
    again = replace(setup.shape, activation_checkpointing="full")
    assert total(replace(setup, shape=again)) <= total(setup)


def test_offloading_moves_what_it_says_to_the_node():
    near = estimate(BIG)
    far = estimate(replace(BIG, offload="cpu", offload_parameters="cpu"))
    assert (far.parts["masters"], far.parts["moments"], far.parts["weights"]) == (0, 0, 0)
    assert far.host["moments"] == near.parts["moments"]
    assert far.host["weights"] == near.parts["weights"]
    # Gradients and weights are pinned, each in one buffer of a power of two.
    pinned = [far.host["gradients"], far.host["weights"]]
    assert far.host["rounding"] == sum(2 ** math.ceil(math.log2(x)) - x for x in pinned)
    assert near.host == {}
    on_cpu = replace(BIG, device="cpu", offload="cpu")
    assert estimate(on_cpu).host == {}


def test_what_is_kept_gathered_costs_memory_up_to_all_of_the_weights():
    run = replace(BIG, shape=replace(GPT_13B, layers=16))
    found = [total(replace(run, keep_gathered=share)) for share in (0.0, 0.5, 1.0)]
    assert found == sorted(set(found))
    weights = states_of(run).resident.weights * run.data
    kept = states_of(replace(run, keep_gathered=1.0)).transient
    assert (kept.held, kept.gathered, kept.returned, kept.arriving) == (*[weights] * 3, 0)
    some = states_of(replace(run, keep_gathered=0.5)).transient
    assert weights / 4 < some.held < weights / 2
    alone = replace(run, data=1)
    assert total(replace(alone, keep_gathered=1.0)) == total(alone)


def test_all_kept_is_offered_where_it_is_a_choice():
    assert all_kept(BIG) == replace(BIG, keep_gathered=1.0)
    for other in (
        replace(BIG, keep_gathered=1.0),
        replace(BIG, data=1),
        replace(BIG, zero=2),
        replace(BIG, offload="cpu", offload_parameters="cpu"),
    ):
        assert all_kept(other) is None


def test_layouts_begin_with_the_run_s_own_and_share_everything_out():
    found = layouts(BIG)
    assert found[0] == BIG
    assert len(found) == len(set(found)) == 16
    assert {(each.tensor, each.data) for each in found} == {(1, 8), (2, 4), (4, 2), (8, 1)}
    assert {each.samples for each in found} == {BIG.samples}
    few_heads = replace(BIG, shape=replace(GPT_13B, kv_heads=2))
    assert {each.tensor for each in layouts(few_heads)} == {1, 2}
    no_batch = replace(BIG, accumulation=1)  # 16 samples for 4 ranks of 4
    assert {each.tensor for each in layouts(no_batch)} == {2, 4, 8}
    offloaded = replace(BIG, offload="cpu")
    assert {each.zero for each in layouts(offloaded)} == {1, 2, 3}


def test_remedies_are_enough():
    own = total(BIG) / GB
    assert suggestions(BIG, own / (1 - RESERVE) + 1) == []
    found = suggestions(BIG, 50)
    assert "activation_checkpointing: full" in found
    assert fits(replace(BIG, shape=replace(GPT_13B, activation_checkpointing="full")), 50)
    [micro] = [words for words in found if words.startswith("micro")]
    assert fits(BIG.with_micro(int(micro.split()[1])), 50)
    assert not fits(BIG, 50)
    assert "activation_checkpointing: selective" in suggestions(BIG, 57)  # the mildest


def test_less_is_kept_gathered_where_that_is_enough():
    kept = replace(BIG, keep_gathered=1.0)
    card = (total(BIG) / GB + 1) / (1 - RESERVE)
    assert suggestions(kept, card)[0] == "keep_gathered: 0.0"
    assert suggestions(kept, 30)  # parameters are not offered to the CPU while they are kept
    assert not any("offload_parameters" in words for words in suggestions(kept, 30))


def test_two_changes_are_named_where_one_is_not_enough():
    found = suggestions(BIG, 30)
    assert found
    assert all(words.count(" and ") == 1 for words in found)
    assert any("16 GPUs" in words for words in found)


def test_nothing_is_promised_where_nothing_is_enough():
    assert suggestions(BIG, 1) == []


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Run `megaphase plan` for a small run, changed by keywords; return the result."""
    monkeypatch.setattr("megaphase.tokenizer.Tokenizer.load", lambda directory: FakeTokenizer())
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    write_corpus(tmp_path / "en", random_lengths(60, 30, 0), seed=0)
    config = write_run(tmp_path, ["en"])
    return lambda *words: CliRunner().invoke(plan_app, [str(config.path), *map(str, words)])


def test_the_command_says_it_in_a_line(plan):
    lines = plan("batch.samples=8", "parallel.tensor=2").stdout.splitlines()
    [line] = [line for line in lines if line.startswith("Memory")]
    assert line.startswith("Memory per GPU (tensor 2 × data 1, ZeRO 3): ")
    assert not any("does not fit" in line for line in lines)
    [line] = [line for line in plan("--processes", 4).stdout.splitlines() if "Memory" in line]
    assert "(tensor 1 × data 4, ZeRO 3)" in line


def test_the_command_counts_the_processes_of_a_launcher(plan, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "(tensor 1 × data 2, ZeRO 3)" in plan().stdout


def test_the_command_says_what_would_fit(plan):
    big = ["model.preset=gpt-6.7b", "model.seq_len=9", "batch.samples=16", "--processes", 16]
    small = [*big, "--memory", 16, "parallel.zero=1"]
    result = plan(*small)
    assert result.exit_code == 0
    [line] = [line for line in result.stdout.splitlines() if "does not fit" in line]
    assert line.startswith("Warning: The run does not fit 16 GB: with 6% in reserve it needs ")
    assert "; it fits with zero 2, or " in line or "; it fits with zero 3, or " in line
    fits = [json.loads(plan(*words, "--json").stdout)["memory"]["layouts"][0]["fits"]
            for words in (small, [*small, "--memory", 1e6])]  # fmt: skip
    assert fits == [False, True]


def test_the_command_shows_other_layouts(plan):
    lines = plan("--layouts", "--processes", 4).stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("tensor"))
    rows = [line.split() for line in lines[first + 2 : -1] if line.strip()]
    assert [row[:3] for row in rows[:2]] == [["1", "4", "3"], ["1", "4", "0"]]
    assert sum("quickest" in row for row in rows) == 1
    assert len(rows) == 12


def test_the_json_holds_every_layout(plan):
    memory = json.loads(plan("--json", "--processes", 2, "--memory", 40).stdout)["memory"]
    assert (memory["processes"], memory["card_gb"], memory["reserve"]) == (2, 40, RESERVE)
    assert memory["layouts"][0]["zero"] == 3
    for layout in memory["layouts"]:
        assert layout["bytes"] == sum(layout["parts"].values())
        assert layout["fits"]
    assert memory["remedies"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["parallel.tensor=2", "--processes", 3],
            "parallel.tensor: 2 does not divide the 3 processes of this run; start a multiple of 2 "
            "processes, or change it",
        ),
        (
            ["--processes", 8],
            "batch.samples: 4 is not a multiple of 8 data-parallel ranks × micro 1 = 8; change "
            "samples, micro or the number of processes",
        ),
        (["model.preset=gpt-4"], "model.preset: no preset 'gpt-4'; did you mean"),
    ],
)
def test_wrong_layouts_are_refused_before_anything_is_built(plan, tmp_path, words, message):
    error = plan(*words).exception
    assert isinstance(error, InputError)
    assert message in str(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_an_average_is_as_large_as_the_fp32_weights_and_where_it_is_said_to_be(zero):
    plain = replace(BIG, zero=zero)
    kept = states_of(plain).resident
    needed = kept.masters if zero else kept.weights
    for setup, here, away in (
        (replace(plain, average="weights"), needed, 0),
        (replace(plain, average="cpu"), 0, needed),
        (replace(plain, average="cpu", device="cpu"), needed, 0),
    ):
        without = replace(setup, average="none")
        assert estimate(setup).total == estimate(without).total + here
        assert estimate(setup).parts["average"] == here
        assert estimate(setup).host.get("average", 0) == away
        assert "average" not in estimate(without).parts
        host, there = lasting_bytes(setup), lasting_bytes(without)
        lasting = (here, away) if setup.device == "cuda" else (0, here)
        assert host == (there[0] + lasting[0], there[1] + lasting[1])
    if zero:
        offloaded = estimate(replace(plain, average="weights", offload="cpu"))
        assert (offloaded.parts["average"], offloaded.host["average"]) == (0, needed)
