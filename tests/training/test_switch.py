"""Promise 5: after a reset the engine is a fresh optimizer on the same fp32 weights, bit for bit.

The reset engine is compared with a new engine, built with other initial weights and set to the
weights at the switch. Both then take the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from distributed import once, run_ranks
from engine_support import (
    build_engine,
    fp32_weights,
    global_batch,
    load_fp32_weights,
    model_weights,
    run_config,
    share,
)
from slow_cases import marked
from torch import Tensor

from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import process_group
from megaphase.training.engine import Engine

STEPS_BEFORE = 4
STEPS_AFTER = 3
LEARNING_RATE = 3e-3

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    tensor: int
    data: int
    zero: int
    precision: str

    def __str__(self) -> str:
        return f"{self.tensor}x{self.data} zero {self.zero} {self.precision}"

    def config(self, seed: int = 1) -> RunConfig:
        return run_config(tensor=self.tensor, zero=self.zero, precision=self.precision, seed=seed)


CASES = [
    *(Case(1, 2, zero, precision) for zero in range(4) for precision in ("fp32", "bf16")),
    Case(2, 2, 3, "fp32"),
    Case(2, 2, 3, "bf16"),
]
QUICK = [Case(1, 2, 0, "fp32"), Case(1, 2, 2, "bf16"), Case(2, 2, 3, "fp32")]
SLOW = [case for case in CASES if case not in QUICK]


@dataclass(frozen=True)
class Step:
    """The results of a step, and the fp32 weights and the model's weights after it."""

    loss: float
    grad_norm: float
    weights: Weights
    model: Weights


@dataclass(frozen=True)
class Comparison:
    """One rank's weights at the switch, and the steps after it."""

    at_switch: Weights
    reset: list[Step]
    fresh_start: Weights
    fresh: list[Step]
    at_switch_again: Weights
    kept: list[Step]


def compare(cases: list[Case]) -> list[Comparison]:
    """Run on a rank."""
    with process_group():
        return [_compare(case) for case in cases]


def _compare(case: Case) -> Comparison:
    engine = _trained(case)
    at_switch = fp32_weights(engine)
    engine.state.reset()
    reset = _steps(engine, STEPS_AFTER)

    fresh = build_engine(case.config(seed=2))
    load_fp32_weights(fresh, at_switch)
    fresh_start = fp32_weights(fresh)

    keeping = _trained(case)
    return Comparison(
        at_switch,
        reset,
        fresh_start,
        _steps(fresh, STEPS_AFTER),
        fp32_weights(keeping),
        _steps(keeping, 1),
    )


def _trained(case: Case) -> Engine:
    engine = build_engine(case.config())
    for step in range(STEPS_BEFORE):
        engine.train_step(share(global_batch(step), engine.grid), LEARNING_RATE)
    return engine


def _steps(engine: Engine, steps: int) -> list[Step]:
    taken = []
    for step in range(STEPS_BEFORE, STEPS_BEFORE + steps):
        batch = share(global_batch(step), engine.grid)
        result = engine.train_step(batch, LEARNING_RATE / 2)
        taken.append(
            Step(result.losses.mean, result.grad_norm, fp32_weights(engine), model_weights(engine))
        )
    return taken


@once
def comparisons(processes: int, slow: bool) -> dict[Case, list[Comparison]]:
    """Return the results of each rank, by case; of the slow or the other cases."""
    cases = [
        each for each in CASES if each.tensor * each.data == processes and (each in SLOW) == slow
    ]
    by_rank = run_ranks(compare, processes, cases)
    return {case: [each[i] for each in by_rank] for i, case in enumerate(cases)}


def same(one: Weights, other: Weights) -> bool:
    """Return whether they are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.distributed
@pytest.mark.parametrize("case", marked(CASES, SLOW), ids=str)
def test_reset_is_a_fresh_optimizer_on_the_same_weights(case: Case) -> None:
    for rank in comparisons(case.tensor * case.data, case in SLOW)[case]:
        assert same(rank.fresh_start, rank.at_switch)
        for native, fresh in zip(rank.reset, rank.fresh, strict=True):
            assert all(each.dtype == torch.float32 for each in native.weights.values())
            assert same(native.weights, fresh.weights)
            assert same(native.model, fresh.model)
            assert (native.loss, native.grad_norm) == (fresh.loss, fresh.grad_norm)
        assert not same(rank.reset[0].weights, rank.at_switch)


@pytest.mark.distributed
@pytest.mark.parametrize("case", marked(CASES, SLOW), ids=str)
def test_without_a_reset_the_old_moments_are_used(case: Case) -> None:
    for rank in comparisons(case.tensor * case.data, case in SLOW)[case]:
        assert same(rank.at_switch_again, rank.at_switch)  # the same training, done twice
        assert rank.kept[0].loss == rank.reset[0].loss
        for name, weight in rank.kept[0].weights.items():
            assert not torch.equal(weight, rank.reset[0].weights[name])
