"""Averages of the fp32 weights: equal to those of plain torch over the weights of every step, on
every layout, saved and read on any other; the training is that of an engine without them."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import save, whole_parameters
from distributed import once, run_ranks
from engine_support import (
    build_engine,
    fp32_weights,
    global_batch,
    model_weights,
    run_config,
    share,
)
from slow_cases import marked
from torch import Tensor

from megaphase.checkpoint.parameters import StoredParameters
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import start_process_grid
from megaphase.optim.average_config import AverageConfig
from megaphase.training.engine import Engine

STEPS, RATE, SKIPPED = 7, 1e-2, 4
VOCAB = 99  # tensor parallelism pads it
TRAINED = range(45, 97)
DECAY = 0.8
EPS = 1e-3  # so large that no update depends on the rounding of a small gradient
TOLERANCE = 1e-6
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    tensor: int
    data: int
    zero: int
    kind: str
    precision: str = "fp32"
    offload: str = "none"
    device: str = "weights"

    def config(self, seed: int = 1) -> RunConfig:
        parallel = {"tensor": self.tensor, "zero": self.zero, "offload": self.offload}
        config = run_config(model={"vocab": VOCAB}, precision=self.precision, seed=seed, **parallel)
        optimizer = type(config.optimizer)(eps=EPS)
        return config.model_copy(update={"optimizer": optimizer})

    @property
    def average(self) -> AverageConfig:
        decay = {"decay": DECAY} if self.kind == "ema" else {}
        settings = {"kind": self.kind, "every_steps": 2, "from_step": 2, "device": self.device}
        return AverageConfig.model_validate(settings | decay)

    @property
    def due(self) -> list[int]:
        """Steps after which the weights are taken; the one of step 4 is skipped."""
        return [2, 6]


LAYOUTS = [
    Case(1, 1, 0, "ema"),
    Case(1, 2, 3, "ema"),
    Case(2, 1, 0, "uniform", device="cpu"),
    Case(1, 2, 2, "uniform", "bf16"),
    Case(1, 2, 1, "ema", "bf16"),
    Case(2, 2, 0, "ema"),
    Case(2, 2, 3, "ema"),
    Case(2, 2, 3, "uniform", "bf16", "cpu", "cpu"),
]
SLOW = [case for case in LAYOUTS if case.tensor * case.data == 2 or case == Case(2, 2, 0, "ema")]


@dataclass
class Examined:
    """What one rank of a case found."""

    of_steps: list[Weights]
    average: Weights
    model_within: Weights
    untouched: bool
    curve: list[tuple[float, float]]
    curve_without: list[tuple[float, float]]
    resumed: Weights
    taken: int


@contextmanager
def not_finite(engine: Engine) -> Iterator[None]:
    """Make every loss NaN while the block runs."""
    hook = engine.module.register_forward_hook(
        lambda module, given, found: tuple(each * math.nan for each in found)
    )
    yield
    hook.remove()


def step(engine: Engine, number: int, *, average: AverageConfig | None) -> Any:
    batch = share(global_batch(number, vocab=VOCAB), engine.grid)
    if number == SKIPPED:
        with not_finite(engine):
            result = engine.train_step(batch, RATE)
        assert not result.applied
    else:
        result = engine.train_step(batch, RATE)
    if average is not None and average.is_due(number):
        engine.average.take(result.applied_on_device)
    return None if number == SKIPPED else (result.losses.mean, result.grad_norm)


def examine(case: Case, folder: Path, control_group: ControlGroup) -> Examined:
    config = case.config()
    engine = build_engine(config, VOCAB)
    engine.average.begin(case.average)
    assert "average" not in engine.state.kinds()
    of_steps, curve = [fp32_weights(engine)], []
    untouched = True
    within: Weights = {}
    for number in range(1, STEPS + 1):
        curve.append(step(engine, number, average=case.average))
        of_steps.append(fp32_weights(engine))
        if number == 5:
            model = model_weights(engine)
            with engine.average.exchanged():
                within = model_weights(engine)
            untouched = same(of_steps[-1], fp32_weights(engine)) and same(
                model, model_weights(engine)
            )
        if number == 3:
            save(engine, config, VOCAB, folder / "early", control_group)
    late = save(engine, config, VOCAB, folder / "late", control_group)
    average = whole_parameters(late, "average")

    plain = build_engine(config, VOCAB)
    curve_without = [step(plain, number, average=None) for number in range(1, STEPS + 1)]

    early = StoredParameters(folder / "early" / "step-00000001")
    plain.state.load(early, 3)
    plain.average.load(early, case.average, 1)
    for number in range(4, STEPS + 1):
        step(plain, number, average=case.average)
    resumed = whole_parameters(
        save(plain, config, VOCAB, folder / "resumed", control_group), "average"
    )
    taken = plain.average.taken
    plain.average.take_over()
    assert plain.average.taken == 0
    assert "average" not in plain.state.kinds()
    taken_over = whole_parameters(
        save(plain, config, VOCAB, folder / "over", control_group), "weight"
    )
    assert same(taken_over, resumed)
    check_frozen(plain, config, folder, control_group)
    return Examined(of_steps, average, within, untouched, curve, curve_without, resumed, taken)


def check_frozen(
    engine: Engine, config: RunConfig, folder: Path, control_group: ControlGroup
) -> None:
    """Where the rows of some tokens alone are trained, the average has all others bit for bit."""
    before = whole_parameters(save(engine, config, VOCAB, folder / "over", control_group))
    engine.state.reset()
    engine.train_only(TRAINED)
    every = AverageConfig(kind="uniform")
    engine.average.begin(every)
    for number in (STEPS + 1, STEPS + 2, STEPS + 3):
        step(engine, number, average=every)
    frozen = save(engine, config, VOCAB, folder / "frozen", control_group)
    for name, average in whole_parameters(frozen, "average").items():
        rows = [range(TRAINED.start), range(TRAINED.stop, VOCAB)]
        kept = [row for part in rows for row in part] if len(average) == VOCAB else slice(None)
        assert torch.equal(average[kept], before[name][kept]), name
    trained = whole_parameters(frozen, "average")["head.weight"][list(TRAINED)]
    assert not torch.equal(trained, before["head.weight"][list(TRAINED)])


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def examine_all(cases: list[Case], folder: str) -> list[Examined]:
    """Run on a rank."""
    found = []
    with process_group():
        control_group = ControlGroup()
        for number, case in enumerate(cases):
            start_process_grid(case.tensor)
            found.append(examine(case, Path(folder, str(number)), control_group))
    return found


@once
def examined(processes: int) -> dict[Case, list[Examined]]:
    cases = [case for case in LAYOUTS if case.tensor * case.data == processes]
    folder = tempfile.mkdtemp(prefix="megaphase-averages-")
    try:
        by_rank = run_ranks(examine_all, processes, cases, folder)
    finally:
        shutil.rmtree(folder)
    return {case: [each[i] for each in by_rank] for i, case in enumerate(cases)}


def plain_average(case: Case, of_steps: list[Weights]) -> Weights:
    """The average in plain torch, fp64."""
    taken = [of_steps[number] for number in case.due]
    found = {}
    for name in taken[0]:
        weights = [each[name].double() for each in taken]
        if case.kind == "uniform":
            found[name] = torch.stack(weights).mean(0)
            continue
        mean = weights[0]
        for each in weights[1:]:
            mean = DECAY * mean + (1 - DECAY) * each
        found[name] = mean
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("case", marked(LAYOUTS, SLOW), ids=str)
def test_an_average_is_that_of_the_weights_of_its_steps(case: Case) -> None:
    for rank in examined(case.tensor * case.data)[case]:
        assert rank.taken == len(case.due)
        assert same(rank.of_steps[SKIPPED], rank.of_steps[SKIPPED - 1])
        assert all(not same(a, b) for a, b in pairwise([rank.of_steps[n] for n in (0, 1, 2, 5)]))
        # Saved from all ranks, and read again by other code.
        if case.tensor == 1:
            for name, wanted in plain_average(case, rank.of_steps).items():
                torch.testing.assert_close(
                    rank.average[name].double(), wanted, rtol=0, atol=TOLERANCE
                )
        # In the middle, only the weights after step 2 are in it.
        dtype = next(iter(rank.model_within.values())).dtype
        for name, weights in rank.of_steps[2].items():
            assert torch.equal(rank.model_within[name], weights.to(dtype))
        assert rank.untouched
        assert rank.curve == rank.curve_without
        assert same(rank.resumed, rank.average)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case", marked([case for case in LAYOUTS if case.precision == "fp32"], SLOW), ids=str
)
def test_averages_of_layouts_are_equal(case: Case) -> None:
    one = LAYOUTS[0]
    reference = examined(1)[one][0]
    wanted = plain_average(case, reference.of_steps)
    found = examined(case.tensor * case.data)[case][0].average
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=0, atol=TOLERANCE)
