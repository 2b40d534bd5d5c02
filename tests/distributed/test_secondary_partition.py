"""A second partition of ZeRO-3's weights: the same numbers, and gathers within the smaller groups.

Four ranks over gloo. Every engine is compared with one without the second partition, digit for
digit: over steps, validations, a reset and a loaded checkpoint. The gathers are counted by the
group to which torch passes them, and compared with `megaphase plan`'s estimate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RunningRanks, check, launch, once, run_ranks
from engine_support import (
    SOME,
    WIDE,
    build_engine,
    fp32_weights,
    global_batch,
    load_fp32_weights,
    model_weights,
    run_config,
    share,
)
from run_support import (
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)
from slow_cases import marked
from torch.utils._python_dispatch import TorchDispatchMode
from warm_commands import kill_before

from megaphase.checkpoint.parameters import StoredParameters
from megaphase.checkpoint.saver import Saver
from megaphase.checkpoint.store import CheckpointStore
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.costs import FP32_BYTES
from megaphase.estimate.communication import data_traffic
from megaphase.estimate.gathered_parameters import gathering, kept_gathered
from megaphase.estimate.hardware import Hardware
from megaphase.estimate.setup import Setup, setup_of
from megaphase.estimate.state_memory import states_of
from megaphase.model.parameters import parameter_sizes
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.training import engine as engine_module
from megaphase.training.engine import Engine
from megaphase.training.secondary_partition import secondary_group

pytestmark = pytest.mark.slow

PROCESSES = 4
VOCAB = 97  # no weight of embedding and head divides evenly
RATE = 3e-3
# DeepSpeed learns the order of the modules from the first passes.
LEARNING_STEPS = 3
ALL_GATHER, REDUCE_SCATTER = "_allgather_base_", "_reduce_scatter_base_"
GPT_13B = GPTShape(
    vocab=50_304, seq_len=2048, layers=40, hidden=5120, heads=40, kv_heads=40, ffn=13696
)
H100 = Hardware("H100", False, 1000e12, 0.5, 3000e9, 8, 450e9, 50e9)


@dataclass(frozen=True)
class Case:
    """near: whether a weight may stay from the forward to the backward pass, as by default."""

    secondary: int | None
    precision: str = "fp32"
    near: bool = True
    micro: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def config(self, seed: int = 1) -> RunConfig:
        return run_config(
            model=WIDE | self.model,
            micro=self.micro,
            precision=self.precision,
            seed=seed,
            zero=3,
            secondary_partition=self.secondary,
            **self.parallel,
        )

    @property
    def micro_batches(self) -> int:
        return self.config().micro_batches(PROCESSES)

    def __hash__(self) -> int:
        return hash(str(self))


TIED = {"tied_embeddings": True, "bias": True, "norm": "layernorm", "position": "learned"}
CASES = [
    Case(2),
    Case(4, micro=2, parallel={"offload": "cpu"}),
    Case(2, "bf16", near=False, parallel={"keep_gathered": SOME}),
    Case(2, near=False, model=TIED),
]
COUNTED = [case for case in CASES if not case.model]
QUICK, SLOW = CASES[:1], CASES[1:]


@dataclass(frozen=True)
class Curve:
    """Losses and norms of steps and validations; the weights after each part."""

    figures: list[Any]
    weights: list[dict[str, torch.Tensor]]


Counts = Counter[tuple[str, str]]


@dataclass(frozen=True)
class Found:
    """Of one rank.

    curve, expected: with a second partition, and without
    group: ranks of the second partition
    step, after_validation: elements passed to the network by a step, by collective and group
    copy_bytes: of the second partition after a forward pass, between steps and after a load
    """

    curve: Curve
    expected: Curve
    group: list[int]
    step: Counts
    after_validation: Counts
    copy_bytes: tuple[int, int, int]


class Recorder(TorchDispatchMode):
    """Counts the elements that are passed to each process group."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self._names, self.found = names, Counts()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            kind = function._schema.name.removeprefix("c10d::")
            tensors = [each for each in args[:2] if isinstance(each, torch.Tensor)]
            size = max((each.numel() for each in tensors), default=0)
            group = next(filter(None, map(_group_name, args)))
            self.found[kind, self._names.get(group, group)] += size
        return function(*args, **(kwargs or {}))


def _group_name(argument: object) -> str | None:
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(argument).group_name
    except RuntimeError:  # another object
        return None


def record(cases: list[Case], folder: str) -> list[Found]:
    """Run on a rank."""
    with process_group():
        control = ControlGroup()
        return [_record(case, Path(folder, str(i)), control) for i, case in enumerate(cases)]


def _record(case: Case, folder: Path, control: ControlGroup) -> Found:
    expected, _ = _curve(replace(case, secondary=None), folder / "without", control)
    assert secondary_group() is None
    curve, engine = _curve(case, folder / "with", control)
    group = secondary_group()
    assert group is not None
    names = {engine.grid.data_group.group_name: "data", group.group_name: "secondary"}
    for step in range(LEARNING_STEPS):
        engine.train_step(_batch(engine, step), RATE)
    recorded = []
    for step in range(2):
        with Recorder(names) as recorder:
            engine.train_step(_batch(engine, step), RATE)
        recorded.append(recorder.found)
        between = _copy_bytes(engine)
        engine.evaluate(_batch(engine, step))
    after_forward = _copy_bytes(engine)
    engine.state.load(StoredParameters(folder / "with" / "step-00000001"), 0)
    return Found(
        curve,
        expected,
        dist.get_process_group_ranks(group),
        *recorded,
        (after_forward, between, _copy_bytes(engine)),
    )


def _curve(case: Case, folder: Path, control: ControlGroup) -> tuple[Curve, Engine]:
    """Steps with validations, a reset, a loaded checkpoint, also in another engine, weights set."""
    engine = _build(case)
    figures: list[Any] = []
    weights = []

    def train(first: int, steps: int = 2) -> None:
        for step in range(first, first + steps):
            result = engine.train_step(_batch(engine, step), RATE)
            figures.append((result.losses.mean, result.grad_norm))
        figures.append(engine.evaluate(_batch(engine, 99)).mean)
        weights.append(
            fp32_weights(engine) | {f"{n}*": w for n, w in model_weights(engine).items()}
        )

    train(0, 3)
    store = CheckpointStore(folder, control)
    saver = Saver(store, control, keep=1, asynchronous=True, say=lambda text: None)
    saver.save("step-00000001", engine.state.snapshot(), {}, {})
    saver.finish()
    stored, steps = StoredParameters(folder / "step-00000001"), engine.state.steps
    train(3)
    engine.state.reset()
    train(5)
    engine.state.load(stored, steps)
    train(3)
    engine = _build(case, seed=2)
    engine.evaluate(_batch(engine, 98))
    engine.state.load(stored, steps)
    train(3)
    load_fp32_weights(engine, {n: w for n, w in weights[0].items() if not n.endswith("*")})
    train(3)
    return Curve(figures, weights), engine


def _build(case: Case, seed: int = 1) -> Engine:
    with nullcontext() if case.near else _far():
        return build_engine(case.config(seed), VOCAB)


@contextmanager
def _far() -> Iterator[None]:
    """As if the model were so large that every weight is far from its next use."""
    settings_of = engine_module.deepspeed_config

    def settings(*given: Any) -> dict[str, Any]:
        found: dict[str, Any] = settings_of(*given)
        for key in ("stage3_max_reuse_distance", "stage3_prefetch_bucket_size"):
            found["zero_optimization"][key] = 0
        return found

    engine_module.deepspeed_config = settings
    try:
        yield
    finally:
        engine_module.deepspeed_config = settings_of


def _batch(engine: Engine, step: int) -> Any:
    return share(global_batch(step, vocab=VOCAB), engine.grid)


def _copy_bytes(engine: Engine) -> int:
    copies: list[Any] = [each.ds_secondary_tensor for each in engine.module.parameters()]
    return sum(copy.numel() * copy.element_size() for copy in copies if copy is not None)


@once
def recorded(slow: bool) -> dict[Case, list[Found]]:
    cases = SLOW if slow else QUICK
    with TemporaryDirectory(prefix="megaphase-secondary-") as folder:
        by_rank = run_ranks(record, PROCESSES, cases, folder, timeout=600)
    return {case: [each[i] for each in by_rank] for i, case in enumerate(cases)}


def by_rank(case: Case) -> list[Found]:
    return recorded(case in SLOW)[case]


@pytest.mark.distributed
@pytest.mark.parametrize("case", marked(CASES, SLOW), ids=str)
def test_losses_norms_and_weights_are_those_without_it(case: Case) -> None:
    for found in by_rank(case):
        assert found.curve.figures == found.expected.figures
        for mine, expected in zip(found.curve.weights, found.expected.weights, strict=True):
            assert mine.keys() == expected.keys()
            assert all(torch.equal(mine[name], each) for name, each in expected.items())


@pytest.mark.distributed
@pytest.mark.parametrize("case", marked(CASES, SLOW), ids=str)
def test_every_engine_has_its_own_groups_of_consecutive_ranks(case: Case) -> None:
    size = case.secondary
    assert size is not None
    for rank, found in enumerate(by_rank(case)):
        first = rank // size * size
        assert found.group == list(range(first, first + size))


@pytest.mark.distributed
@pytest.mark.parametrize("case", marked(COUNTED, SLOW), ids=str)
def test_a_weight_is_gathered_from_all_ranks_once_a_step(case: Case) -> None:
    sizes = _padded(case)
    kept_names = _kept(case)
    every = sum(sizes.values())
    kept = sum(sizes[name] for name in kept_names)
    gathers = case.micro_batches * (1 if case.near else 2)
    for found in by_rank(case):
        assert found.step[ALL_GATHER, "data"] == every  # what is kept at the end of the step
        assert found.step[ALL_GATHER, "secondary"] == (gathers - 1) * (every - kept)
        # A validation has made the copy that the next step uses, or the weights have stayed.
        again = found.after_validation
        assert again[ALL_GATHER, "data"] == kept
        after = gathers - case.near
        assert again[ALL_GATHER, "secondary"] == after * (every - kept)
        assert again[REDUCE_SCATTER, "data"] == found.step[REDUCE_SCATTER, "data"] > 0
        assert {group for _, group in found.step} == {"data", "secondary"} - (
            set() if gathers > 1 else {"secondary"}
        )


def _padded(case: Case) -> dict[str, int]:
    """Elements of each parameter, rounded up to parts of the same size."""
    sizes = parameter_sizes(build_shape(case.config(), VOCAB), 1)
    return {name: -(-size // PROCESSES) * PROCESSES for name, size in sizes.items()}


def _kept(case: Case) -> set[str]:
    sizes = parameter_sizes(build_shape(case.config(), VOCAB), 1)
    return kept_gathered(sizes, case.config().parallel.keep_gathered)


@pytest.mark.distributed
@pytest.mark.parametrize("case", marked(CASES, SLOW), ids=str)
def test_the_copy_is_there_from_the_first_forward_pass_to_the_end_of_a_step(case: Case) -> None:
    config = case.config()
    setup = setup_of(config, build_shape(config, VOCAB), PROCESSES, "cuda")
    sizes, kept = _padded(case), _kept(case)
    assert case.secondary is not None
    whole = sum(sizes.values()) // case.secondary * setup.parameter_bytes
    assert states_of(setup).transient.secondary == whole
    unkept = sum(size for name, size in sizes.items() if name not in kept)
    for found in by_rank(case):
        assert found.copy_bytes[1:] == (0, 0)
        assert found.copy_bytes[0] <= unkept // case.secondary * setup.parameter_bytes
        if not case.near:
            assert found.copy_bytes[0] == unkept // case.secondary * setup.parameter_bytes


@pytest.mark.distributed
@pytest.mark.parametrize("case", marked([case for case in COUNTED if case.near], SLOW), ids=str)
def test_the_plan_estimates_what_is_really_sent(case: Case) -> None:
    config = case.config()
    setup = setup_of(config, build_shape(config, VOCAB), PROCESSES, "cuda")
    traffic = data_traffic(setup, H100).step(case.micro_batches)
    assert case.secondary is not None
    [found, *_] = by_rank(case)
    within = found.step[ALL_GATHER, "secondary"] * (case.secondary - 1) / case.secondary
    elements = found.step[ALL_GATHER, "data"] + found.step[REDUCE_SCATTER, "data"]
    across = elements * (PROCESSES - 1) / PROCESSES
    # Parts are rounded up to equal sizes, which the estimate leaves out.
    assert traffic.secondary == pytest.approx(within * FP32_BYTES, rel=1e-3)
    assert traffic.sent - traffic.secondary == pytest.approx(across * FP32_BYTES, rel=1e-3)


def test_the_estimate_counts_gathers_in_both_passes() -> None:
    plain = Setup(GPT_13B, 1, 16, 3, False, True, micro=1, accumulation=4)
    setup = replace(plain, secondary=8)
    sizes = parameter_sizes(GPT_13B, 1)
    found = gathering(sizes, 0.0)
    every, low = sum(sizes.values()), 2
    passes = found.passes.forward + found.passes.backward
    assert found.passes.backward > 0
    before, traffic = (data_traffic(each, H100).step(4) for each in (plain, setup))
    across = (every + 4 * every) * low * 15 / 16
    within = (4 * passes - (every - found.kept)) * low * 7 / 8
    assert traffic.sent - traffic.secondary == pytest.approx(across)
    assert traffic.secondary == pytest.approx(within)
    assert before.secondary == 0
    assert traffic.seconds < before.seconds


@pytest.mark.distributed
def test_a_run_resumes_and_changes_its_phase_with_the_numbers_of_one_without_it(
    tmp_path: Path,
) -> None:
    corpora = make_corpora(tmp_path / "corpora")
    sizes = {"layers": 1, "heads": 4, "kv_heads": 2, "seq_len": 32, **WIDE}
    settings = run_settings(corpora, model=sizes, batch={"samples": 8, "micro": 1})

    def run_file(name: str, secondary: int | None) -> Path:
        parallel = {"zero": 3} | ({"secondary_partition": secondary} if secondary else {})
        return write_run_file(tmp_path / name, settings | {"parallel": parallel})

    plain, killed = run_file("plain", None), run_file("killed", 2)
    check(launch(megaphase("train", plain), PROCESSES))
    # Before the switch, and after it.
    for step in (7, 18):
        argv = megaphase("train", killed)
        with RunningRanks(argv, PROCESSES, prepare=partial(kill_before, step)) as ranks:
            assert any(result.returncode for result in ranks.wait(300))
    check(launch(megaphase("train", killed), PROCESSES))
    rows = [timeless(read_rows(file.parent / "run")) for file in (plain, killed)]
    assert rows[0] == rows[1]
    assert sum(row.get("event") == "resume" for row in read_rows(killed.parent / "run")) == 2


@pytest.mark.distributed
def test_what_does_not_go_with_it_is_refused_in_a_line(tmp_path: Path) -> None:
    settings = run_settings(make_corpora(tmp_path / "corpora"))
    parallel = {"zero": 3, "secondary_partition": 3}
    run_file = write_run_file(tmp_path, settings | {"parallel": parallel})
    refused = {
        (): "parallel.secondary_partition: 3 does not divide the 4 data-parallel ranks of this "
        "run; start a multiple of 3 processes, change it, or leave it out",
        ("parallel.tensor=2",): "parallel: secondary_partition needs zero 3, tensor 1 and "
        "offload_parameters: none",
    }
    for overrides, message in refused.items():
        results = launch(megaphase("train", run_file, *overrides), PROCESSES)
        assert {result.returncode for result in results} == {2}
        [line] = "".join(result.stderr for result in results).splitlines()
        assert message in line
    [alone] = launch(megaphase("plan", run_file, "parallel.secondary_partition=2"), 1)
    assert alone.returncode == 2  # WORLD_SIZE is 1
    assert "does not divide the 1 data-parallel ranks" in alone.stderr
    [planned] = launch(megaphase("plan", run_file, "batch.samples=12", "--processes", 6), 1)
    assert "(tensor 1 × data 6, ZeRO 3)" in planned.stdout
