"""The same steps twice: whether they are bit for bit the same."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import torch

from gpu_parts.serving import Results
from gpu_parts.setups import LEARNING_RATE, Case, base_case, seconds_of, with_engine
from megaphase.config.run import RunConfig
from megaphase.training.engine import Engine

STEPS = 20


def twice(results: Results) -> None:
    """Without promises: the gradient of attention may be summed in another order each time."""
    compare(case_of(results.rehearse), results)


def deterministic(results: Results) -> None:
    """With `deterministic: true` they must be the same."""
    if "deterministic" not in RunConfig.model_fields:
        results.record("same", "this version has no key `deterministic`")
        return
    compare(case_of(results.rehearse).with_changes(**{"": {"deterministic": True}}), results)
    found = results.values["same"]
    results.expect(all(found.values()), f"20 steps differ from 20 steps: {found}")


def case_of(rehearse: bool) -> Case:
    base = base_case(rehearse, "gpt-125m")
    return base if rehearse else Case(base.model, seq_len=1024, micro=8, accumulation=2)


def compare(case: Case, results: Results) -> None:
    runs = []
    for number in ("first", "second"):
        runs.append(with_engine(case, partial(train, case), drawn_on_the_device=False))
        results.record(f"{number}_ms_a_step", runs[-1].pop("ms"))
    one, other = runs
    results.record("same", {name: one[name] == other[name] for name in one})
    losses = list(zip(one["losses"], other["losses"], strict=True))
    unlike = [i for i, (a, b) in enumerate(losses, 1) if a != b]
    results.record("first_step_with_another_loss", unlike[0] if unlike else None)
    results.record("largest_difference_of_losses", max(abs(a - b) for a, b in losses))


def train(case: Case, engine: Engine) -> dict[str, Any]:
    """Losses and gradient norms of some steps, a hash of the weights after them, and the time."""
    found: dict[str, Any] = {"losses": [], "grad_norms": []}

    def step(number: int) -> None:
        result = engine.train_step(case.batch(number), LEARNING_RATE, number)
        found["losses"].append(float(result.losses.mean))
        found["grad_norms"].append(float(result.grad_norm))

    step(1)
    seconds = seconds_of(lambda: [step(number) for number in range(2, STEPS + 1)])
    weights = hashlib.sha256()
    for parameter in engine.module.parameters():
        weights.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    found["weights"] = weights.hexdigest()
    return found | {"ms": round(1e3 * seconds / (STEPS - 1), 2)}
