"""Weights of tasks' losses, compared with training in plain torch, and over layouts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from distributed import once, run_ranks
from engine_support import (
    CLIP,
    MODEL,
    TASKS,
    build_engine,
    fp32_weights,
    global_batch,
    run_config,
    share,
)
from plain_gpt import PlainAdamW, PlainGPT, PlainShape
from rounding import FP32
from torch import Tensor

from megaphase.distributed.all_ranks import process_group

STEPS = 6
LEARNING_RATE = 3e-3
Z_LOSS = 1e-2
# An engine has each of them in turn, from step 0 on.
WEIGHTS = [(0.25, 1.0), (3.0, 1.0), (0.0, 2.0)]
SWITCH = STEPS // len(WEIGHTS)


@dataclass(frozen=True)
class Case:
    tensor: int
    data: int
    zero: int
    sequence: bool = False
    micro: int = 2


CASES = [
    Case(1, 1, 0),
    Case(1, 1, 0, micro=8),
    Case(2, 2, 3, sequence=True),
    Case(2, 2, 1, micro=1),
]


@dataclass(frozen=True)
class Curve:
    """Losses by task in nats a token and the norms of the gradients, of every step."""

    by_task: list[dict[str, float]]
    norms: list[float]
    weights_before: dict[str, Tensor]


def train_curves(cases: list[Case]) -> list[Curve]:
    """Run on a rank."""
    with process_group():
        return [_train(case) for case in cases]


def _train(case: Case) -> Curve:
    config = run_config(
        model={"z_loss": Z_LOSS},
        micro=case.micro,
        tensor=case.tensor,
        zero=case.zero,
        sequence=case.sequence,
    )
    engine = build_engine(config)
    curve = Curve([], [], fp32_weights(engine))
    for step in range(STEPS):
        engine.weigh_losses(WEIGHTS[step // SWITCH])
        batch = share(global_batch(step, short=True), engine.grid)
        result = engine.train_step(batch, LEARNING_RATE)
        curve.by_task.append(result.losses.by_task(TASKS))
        curve.norms.append(result.grad_norm)
    return curve


@once
def curves(processes: int) -> dict[Case, Curve]:
    cases = [each for each in CASES if each.tensor * each.data == processes]
    return dict(zip(cases, run_ranks(train_curves, processes, cases)[0], strict=True))


@once
def plain_curve() -> Curve:
    weights = curves(1)[CASES[0]].weights_before
    shape = PlainShape(layers=MODEL["layers"], heads=MODEL["heads"], kv_heads=MODEL["heads"])
    model = PlainGPT(weights, shape)
    optimizer = PlainAdamW(model.weights, clip=CLIP)
    curve = Curve([], [], weights)
    for step in range(STEPS):
        batch = global_batch(step, short=True)
        losses = model.losses(batch.inputs, batch.targets)
        scored = batch.targets >= 0
        weights_of_rows = torch.tensor(WEIGHTS[step // SWITCH]).double()[batch.tasks].unsqueeze(1)
        penalty = Z_LOSS * model.log_sums(model.logits(batch.inputs)).square()
        minimized = (weights_of_rows * scored * (losses + penalty)).sum()
        minimized = minimized / (weights_of_rows * scored).sum()
        gradients = torch.autograd.grad(minimized, list(model.weights.values()))
        curve.norms.append(
            optimizer.step(dict(zip(model.weights, gradients, strict=True)), LEARNING_RATE)
        )
        means = [
            float(losses.detach()[batch.tasks == i].sum() / scored[batch.tasks == i].sum())
            for i in range(len(TASKS))
        ]
        curve.by_task.append(dict(zip(TASKS, means, strict=True)))
    return curve


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_losses_of_tasks_are_weighted_as_in_plain_torch(case: Case) -> None:
    found, plain = curves(case.tensor * case.data)[case], plain_curve()
    assert found.norms == pytest.approx(plain.norms, rel=10 * FP32)
    for step, (trained, expected) in enumerate(zip(found.by_task, plain.by_task, strict=True)):
        assert trained == pytest.approx(expected, rel=FP32), step


def ratios() -> list[list[float]]:
    """Run on a rank: the norms of two steps with several weights."""
    with process_group():
        found = []
        for weights in [None, (5.0, 5.0), (1.0, 2.0), (2.0, 4.0)]:
            engine = build_engine(run_config(zero=2))
            if weights is not None:
                engine.weigh_losses(weights)
            found.append(
                [engine.train_step(global_batch(step), LEARNING_RATE).grad_norm for step in (0, 1)]
            )
        return found


def test_only_the_ratios_of_weights_matter() -> None:
    none, equal, one, two = run_ranks(ratios, 1)[0]
    assert none == equal
    assert one == two
    assert one != none
