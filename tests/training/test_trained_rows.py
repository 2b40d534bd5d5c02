"""Training the rows of new tokens alone, under every ZeRO stage and tensor parallelism.

Frozen weights stay bit for bit; the rows are those that torch's AdamW computes on them alone, from
the gradients of a model in plain torch; a resumed phase and the phase after it are exact.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import save
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
from plain_gpt import PlainGPT, PlainShape
from pydantic import TypeAdapter
from rounding import FP32, assert_close
from slow_cases import marked
from torch import Tensor

from megaphase.checkpoint.parameters import StoredParameters
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import start_process_grid
from megaphase.optim.config import OptimizerConfig
from megaphase.training.engine import Engine

VOCAB = 99  # tensor parallelism pads it
NEW = range(45, 97)  # on both tensor-parallel ranks, and not up to the end
STEPS, SAVED, AFTER = 5, 3, 2
RATE, CLIP, DECAY = 1e-2, 0.535, 0.3
BETAS, EPS = (0.9, 0.95), 1e-3  # large, so that no update depends on the rounding of a gradient

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    tensor: int
    zero: int
    tied: bool = False
    precision: str = "fp32"
    offload: str = "none"
    sequence: bool = False
    optimizer: str = "adamw"

    def config(self, seed: int = 1) -> RunConfig:
        parallel: dict[str, Any] = {
            "tensor": self.tensor,
            "zero": self.zero,
            "sequence": self.sequence,
        }
        if self.offload != "none":
            parallel["offload"] = self.offload
        config = run_config(
            model={"tied_embeddings": self.tied}, precision=self.precision, seed=seed, **parallel
        )
        settings: dict[str, Any] = {"clip": CLIP, "weight_decay": DECAY}
        if self.optimizer == "adamw":
            settings |= {"betas": BETAS, "eps": EPS}
        else:
            settings |= {"name": self.optimizer}
        optimizer = TypeAdapter(OptimizerConfig).validate_python(settings)
        return config.model_copy(update={"optimizer": optimizer})


OTHERS = ["adafactor", "lion", "muon"]
FP32_CASES = [
    *(Case(tensor, zero, tied) for tensor, zero, tied in product((1, 2), range(4), (False, True))),
    Case(2, 3, sequence=True),
]
CASES = [
    *FP32_CASES,
    *(Case(1, zero, precision="bf16") for zero in range(4)),
    Case(2, 3, precision="bf16"),
    Case(2, 2, offload="cpu"),
    Case(2, 3, offload="cpu"),
    *(Case(2, zero, optimizer=name) for name in OTHERS for zero in range(4)),
]
SLOW = [
    case
    for case in CASES
    if case.tensor == 1
    or case.optimizer != "adamw"
    or case.tied
    or case
    in (
        *(Case(2, zero) for zero in (1, 2, 3)),
        Case(2, 2, offload="cpu"),
    )
]
QUICK = [case for case in CASES if case not in SLOW]


EACH, EACH_FP32 = marked(CASES, SLOW), marked(FP32_CASES, SLOW)


@dataclass(frozen=True)
class Figures:
    """What is measured of a step, and the fp32 weights and the model's weights after it."""

    loss: float
    norm: float
    weights: Weights
    model: Weights


@dataclass(frozen=True)
class Examined:
    before: Weights
    steps: list[Figures]
    skipped: Figures
    resumed: list[Figures]
    after: list[Figures]
    fresh: list[Figures]


def train(engine: Engine, first: int, steps: int) -> list[Figures]:
    found = []
    for step in range(first, first + steps):
        result = engine.train_step(share(global_batch(step, vocab=VOCAB), engine.grid), RATE)
        figures = result.losses.mean, result.grad_norm
        found.append(Figures(*figures, fp32_weights(engine), model_weights(engine)))
    return found


@contextmanager
def not_finite(engine: Engine):  # type: ignore[no-untyped-def]
    def spoil(module: object, given: object, found: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(each * math.nan for each in found)

    hook = engine.module.register_forward_hook(spoil)
    yield
    hook.remove()


def examine(case: Case, folder: Path, control_group: ControlGroup) -> Examined:
    engine = build_engine(case.config(), VOCAB)
    train(engine, 50, 2)  # leaves gradients and moments behind
    engine.state.reset()
    engine.train_only(NEW)
    before = fp32_weights(engine)
    steps = train(engine, 0, SAVED)
    checkpoint = save(engine, case.config(), VOCAB, folder, control_group)
    steps += train(engine, SAVED, STEPS - SAVED)
    with not_finite(engine):
        skipped = train(engine, 90, 1)[0]

    other = build_engine(case.config(seed=2), VOCAB)
    other.train_only(NEW)
    other.state.load(StoredParameters(checkpoint), SAVED)
    resumed = train(other, SAVED, STEPS - SAVED)

    engine.state.reset()
    engine.train_only(None)
    fresh = build_engine(case.config(seed=3), VOCAB)
    load_fp32_weights(fresh, steps[-1].weights)
    return Examined(
        before,
        steps,
        skipped,
        resumed,
        train(engine, STEPS, AFTER),
        train(fresh, STEPS, AFTER),
    )


def examine_all(cases: list[Case], folder: str) -> list[Examined]:
    with process_group():
        start_process_grid(cases[0].tensor)
        control_group = ControlGroup()
        return [
            examine(case, Path(folder, str(number)), control_group)
            for number, case in enumerate(cases)
        ]


@once
def examined(tensor: int, quick: bool) -> dict[Case, list[Examined]]:
    """Return the results of each rank, by case."""
    cases = [case for case in (QUICK if quick else SLOW) if case.tensor == tensor]
    folder = tempfile.mkdtemp(prefix="megaphase-rows-")
    try:
        by_rank = run_ranks(examine_all, 2 * tensor, cases, folder, timeout=600)
    finally:
        shutil.rmtree(folder)
    return {case: [each[i] for each in by_rank] for i, case in enumerate(cases)}


def by_rank(case: Case) -> list[Examined]:
    return examined(case.tensor, case in QUICK)[case]


def own_rows(case: Case, rank: int) -> range:
    """Return the new tokens' rows among those of a rank: 50 of the padded 100 at tensor 2."""
    if case.tensor == 1:
        return NEW
    first = 50 * (rank % 2)
    return range(max(NEW.start - first, 0), min(NEW.stop - first, 50))


def whole(case: Case, weights: list[Weights]) -> Weights:
    """Return whole vocabulary matrices from the first tensor-parallel group's, without padding."""
    parts = weights[: case.tensor]
    names = [name for name in parts[0] if name in ("embedding.weight", "head.weight")]
    return {name: torch.cat([part[name] for part in parts])[:VOCAB] for name in names}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.distributed
@pytest.mark.parametrize("case", EACH, ids=str)
def test_frozen_weights_stay_as_they_are(case: Case) -> None:
    for rank, found in enumerate(by_rank(case)):
        rows = own_rows(case, rank)
        last = found.steps[-1].weights
        for name, old in found.before.items():
            if name in ("embedding.weight", "head.weight"):
                assert torch.equal(last[name][: rows.start], old[: rows.start]), name
                assert torch.equal(last[name][rows.stop :], old[rows.stop :]), name
                assert not torch.equal(last[name][rows.start : rows.stop],
                                       old[rows.start : rows.stop])  # fmt: skip
            else:
                assert torch.equal(last[name], old), name


@pytest.mark.distributed
@pytest.mark.parametrize("case", EACH_FP32, ids=str)
def test_new_rows_are_those_of_adamw_on_them_alone(case: Case) -> None:
    found = by_rank(case)
    plain, norms = plainly_trained(Case(1, 0, case.tied))
    clipped = [norm > CLIP for norm in norms]
    assert any(clipped), norms
    assert not all(clipped), norms
    assert [step.norm for step in found[0].steps] == pytest.approx(norms, rel=FP32)
    matrices = whole(case, [each.steps[-1].weights for each in found])
    assert matrices.keys() == plain.keys()
    for name, rows in plain.items():
        assert_close(matrices[name][NEW.start : NEW.stop], rows, what=name)


@once
def plainly_trained(case: Case) -> tuple[Weights, list[float]]:
    """Return the rows after the steps, and the norms of their gradients before clipping."""
    start = by_rank(case)[0].before
    model = PlainGPT(start, PlainShape(layers=2, heads=4, kv_heads=4))
    names = [name for name in ("embedding.weight", "head.weight") if name in start]
    rows = {n: start[n][NEW.start : NEW.stop].clone().requires_grad_() for n in names}
    optimizer = torch.optim.AdamW(rows.values(), RATE, BETAS, EPS, DECAY)
    norms = []
    for step in range(STEPS):
        batch = global_batch(step, vocab=VOCAB)
        model.losses(batch.inputs, batch.targets).mean().backward()  # type: ignore[no-untyped-call]
        for name, each in rows.items():
            gradient = model.weights[name].grad
            assert gradient is not None
            each.grad = gradient[NEW.start : NEW.stop].float()
        norms.append(float(torch.nn.utils.clip_grad_norm_(rows.values(), CLIP)))
        optimizer.step()
        for weight in model.weights.values():
            weight.grad = None
        for name, each in rows.items():
            model.weights[name].data[NEW.start : NEW.stop] = each.detach().double()
    return {name: each.detach() for name, each in rows.items()}, norms


@pytest.mark.distributed
@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_resumed_phase_is_exact(case: Case) -> None:
    for found in by_rank(case):
        for step, resumed in zip(found.steps[SAVED:], found.resumed, strict=True):
            assert (step.loss, step.norm) == (resumed.loss, resumed.norm)
            assert same(step.weights, resumed.weights)
            assert same(step.model, resumed.model)


@pytest.mark.distributed
@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(case: Case) -> None:
    for found in by_rank(case):
        assert not math.isfinite(found.skipped.norm)
        assert same(found.skipped.weights, found.steps[-1].weights)


@pytest.mark.distributed
@pytest.mark.parametrize("case", EACH, ids=str)
def test_the_next_phase_begins_as_a_fresh_optimizer(case: Case) -> None:
    for found in by_rank(case):
        for step, fresh in zip(found.after, found.fresh, strict=True):
            assert (step.loss, step.norm) == (fresh.loss, fresh.norm)
            assert same(step.weights, fresh.weights)
            assert same(step.model, fresh.model)
        unfrozen = found.after[-1].weights["norm.weight"]
        assert not torch.equal(unfrozen, found.steps[-1].weights["norm.weight"])
