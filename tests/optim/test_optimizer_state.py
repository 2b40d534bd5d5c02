"""Weights, moments and step counts under every ZeRO stage, precision and offload.

Saved and read again on the same layout they are equal bit for bit; on another layout the loss curve
continues to 1e-5; after a reset nothing of them is left; a gradient that is not finite changes none
of them.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import whole_parameters
from distributed import once, run_ranks
from engine_support import (
    SOME,
    WIDE,
    build_engine,
    fp32_weights,
    global_batch,
    run_config,
    share,
)
from rounding import FP32
from torch import Tensor

from megaphase.checkpoint.parameters import INDEX_FILE, StoredParameters
from megaphase.checkpoint.saver import Saver
from megaphase.checkpoint.store import CheckpointStore
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import start_process_grid
from megaphase.training.engine import Engine
from megaphase.training.step_result import StepResult

PROCESSES = 4
BEFORE, AFTER = 3, 3
RATE = 1e-2

OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "optimizer": {"offload": "cpu"},
    "optimizer and parameters": {"offload": "cpu", "offload_parameters": "cpu"},
}
KEPT: dict[str, dict[str, Any]] = {
    f"{words} weights kept": {"model": WIDE, "keep_gathered": kept}
    for words, kept in (("some", SOME), ("all", 1.0))
} | {"second partition": {"model": WIDE, "tensor": 1, "secondary_partition": 2}}
CASES = [
    (zero, precision, offload)
    for zero in range(4)
    for precision in ("fp32", "bf16")
    for offload in OFFLOADS | KEPT
    if offload == "none" or (zero > 0 and (offload == "optimizer" or zero == 3))
]
ALSO_QUICK = [
    (3, "bf16", "optimizer and parameters"),
    (3, "bf16", "some weights kept"),
    (3, "fp32", "all weights kept"),
    (3, "bf16", "second partition"),
]
QUICK = [case for case in CASES if case[2] == "none" or case in ALSO_QUICK]
SLOW = [case for case in CASES if case not in QUICK]
PARAMETERS = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
# Every change of layout changes the tensor-parallel size, the stage, or both.
HOPS = [
    (1, 0),
    (2, 3),
    (4, 1),
    (1, 3),
    (4, 3),
    (2, 0),
    (1, 2),
    (2, 1),
    (4, 0),
    (2, 2),
    (1, 1),
    (4, 2),
]
HOP_STEPS = 2


@dataclass
class Examined:
    """The results of one case; curves are losses and gradient norms."""

    undisturbed: list[tuple[float, float]]
    resumed: list[tuple[float, float]]
    steps: int
    same_weights: bool
    after_reset: list[tuple[float, float]]
    fresh: list[tuple[float, float]]
    reset_steps: int
    skipped: list[bool]
    skip_changed_nothing: bool
    after_skip: list[tuple[float, float]]


def train(engine: Engine, first: int, steps: int) -> list[StepResult]:
    batches = (share(global_batch(first + i), engine.grid) for i in range(steps))
    return [engine.train_step(batch, RATE) for batch in batches]


def curve(results: list[StepResult]) -> list[tuple[float, float]]:
    return [(result.losses.mean, result.grad_norm) for result in results]


def save(engine: Engine, folder: Path, control_group: ControlGroup) -> Path:
    """Save as a run does; return the checkpoint's folder."""
    store = CheckpointStore(folder, control_group)
    saver = Saver(store, control_group, keep=1, asynchronous=True, say=lambda text: None)
    saver.save("step-00000001", engine.state.snapshot(), {}, {})
    saver.finish()
    return folder / "step-00000001"


@contextmanager
def not_finite(engine: Engine) -> Iterator[None]:
    """Make every loss NaN while the block runs."""

    def spoil(module: object, given: object, found: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(each * math.nan for each in found)

    hook = engine.module.register_forward_hook(spoil)
    yield
    hook.remove()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def examine(
    zero: int, precision: str, offload: str, folder: Path, control_group: ControlGroup
) -> Examined:
    settings = {"tensor": 2, "zero": zero, "precision": precision, **(OFFLOADS | KEPT)[offload]}
    engine = build_engine(run_config(**settings))
    train(engine, 0, BEFORE)
    checkpoint = save(engine, folder, control_group)
    steps = engine.state.steps
    undisturbed = curve(train(engine, BEFORE, AFTER))
    last_weights = fp32_weights(engine)
    engine.state.reset()
    reset_steps = engine.state.steps

    other = build_engine(run_config(seed=2, **settings))
    stored = StoredParameters(checkpoint)
    other.state.load(stored, steps)
    with not_finite(other):
        before = fp32_weights(other)
        skipped = [not result.applied for result in train(other, 50, 2)]
        unchanged = equal(before, fp32_weights(other))
    resumed = curve(train(other, BEFORE, AFTER))
    same = equal(last_weights, fp32_weights(other))

    other.state.load(stored, steps)
    other.state.reset()
    # Nor does it matter to the numbers which weights stay gathered, or are partitioned twice.
    plain = settings | {"keep_gathered": 0.0, "secondary_partition": None}
    fresh = build_engine(run_config(seed=3, **plain))
    fresh.state.load(stored, 0)
    return Examined(
        undisturbed,
        resumed,
        steps,
        same,
        curve(train(other, BEFORE, AFTER)),
        curve(train(fresh, BEFORE, AFTER)),
        reset_steps,
        skipped,
        unchanged,
        resumed,
    )


def examine_all(
    cases: list[tuple[int, str, str]], folder: str
) -> dict[tuple[int, str, str], Examined]:
    with process_group():
        start_process_grid(2)
        control_group = ControlGroup()
        return {
            case: examine(*case, Path(folder, "-".join(map(str, case))), control_group)
            for case in cases
        }


@once
def examined(quick: bool) -> list[dict[tuple[int, str, str], Examined]]:
    folder = tempfile.mkdtemp(prefix="megaphase-states-")
    try:
        return run_ranks(examine_all, PROCESSES, QUICK if quick else SLOW, folder, timeout=600)
    finally:
        shutil.rmtree(folder)


def by_rank(case: tuple[int, str, str]) -> list[Examined]:
    return [results[case] for results in examined(case in QUICK)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", PARAMETERS, ids=str)
def test_what_was_saved_goes_on_bit_for_bit(case: tuple[int, str, str]) -> None:
    found = by_rank(case)[0]
    assert found.steps == BEFORE
    assert found.resumed == found.undisturbed
    assert all(rank.same_weights for rank in by_rank(case))


@pytest.mark.distributed
@pytest.mark.parametrize("case", PARAMETERS, ids=str)
def test_a_reset_leaves_a_fresh_optimizer(case: tuple[int, str, str]) -> None:
    found = by_rank(case)[0]
    assert found.reset_steps == 0
    assert found.after_reset == found.fresh
    assert found.after_reset != found.undisturbed


@pytest.mark.distributed
@pytest.mark.parametrize("case", PARAMETERS, ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(case: tuple[int, str, str]) -> None:
    # The steps after it are those of an engine that never saw it, for which see above.
    assert by_rank(case)[0].skipped == [True, True]
    assert all(rank.skip_changed_nothing for rank in by_rank(case))


def hop(folder: str) -> tuple[list[float], list[float]]:
    """Return a curve on one layout throughout, and one that changes it every two steps."""
    model = {"kv_heads": 4, "vocab": 99}  # 99: every size pads its rows differently
    with process_group():
        start_process_grid(1)
        control_group = ControlGroup()
        still = build_engine(run_config(model=model, tensor=1, zero=0), 99)
        still_curve = [
            result.losses.mean
            for i in range(len(HOPS) * HOP_STEPS)
            for result in [still.train_step(share(batch(i), still.grid), RATE)]
        ]
        curve: list[float] = []
        checkpoint, steps = None, 0
        for number, (tensor, zero) in enumerate(HOPS):
            engine = build_engine(
                run_config(model=model, seed=number, tensor=tensor, zero=zero), 99
            )
            if checkpoint is None:
                engine = still_at_the_start(model)
            else:
                engine.state.load(StoredParameters(checkpoint), steps)
            for _ in range(HOP_STEPS):
                result = engine.train_step(share(batch(len(curve)), engine.grid), RATE)
                curve.append(result.losses.mean)
            checkpoint, steps = (
                save(engine, Path(folder, str(number)), control_group),
                engine.state.steps,
            )
        return still_curve, curve


def still_at_the_start(model: dict[str, Any]) -> Engine:
    return build_engine(run_config(model=model, tensor=1, zero=0), 99)


def batch(step: int):  # type: ignore[no-untyped-def]
    return global_batch(step, vocab=99)


@pytest.mark.distributed
def test_a_run_goes_on_on_any_layout() -> None:
    folder = tempfile.mkdtemp(prefix="megaphase-hops-")
    try:
        for still, hopping in run_ranks(hop, PROCESSES, folder, timeout=600):
            assert len(still) == len(hopping) == len(HOPS) * HOP_STEPS
            assert hopping == pytest.approx(still, rel=FP32)
        _check_files(Path(folder, str(HOPS.index((4, 3))), "step-00000001"))
    finally:
        shutil.rmtree(folder)


def _check_files(checkpoint: Path) -> None:
    """Check, with other code, that every element is stored once, as documented."""
    index = json.loads((checkpoint / INDEX_FILE).read_text())
    assert index["kinds"] == ["weight", "exp_avg", "exp_avg_sq"]
    stored = StoredParameters(checkpoint)
    found = whole_parameters(checkpoint)
    assert found.keys() == index["parameters"].keys()
    for name, whole in found.items():
        assert torch.equal(whole, stored.whole(name, "weight")), name
