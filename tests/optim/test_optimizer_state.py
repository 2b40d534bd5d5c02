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
from convert_support import save as save_whole
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
from megaphase.convert.partition import Layout
from megaphase.convert.reshape import reshape
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
ADAMW = [
    (zero, precision, offload, "adamw")
    for zero in range(4)
    for precision in ("fp32", "bf16")
    for offload in OFFLOADS | KEPT
    if offload == "none" or (zero > 0 and (offload == "optimizer" or zero == 3))
]
OTHERS = {"adafactor": 1e-2, "lion": 1e-3, "muon": 1e-2}  # with their learning rates
CASES = ADAMW + [
    (*case[:3], name)
    for name in OTHERS
    for case in ADAMW
    if case[2] in ("none", "optimizer", "second partition")
]
QUICK = [
    (3, "bf16", "optimizer and parameters", "adamw"),
    (1, "bf16", "none", "adafactor"),
    (3, "fp32", "none", "muon"),
    (0, "fp32", "none", "adamw"),
]
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
FEW_HOPS = [(1, 0), (4, 3), (2, 1)]
HOP_STEPS = 2
FP32_OF_OTHERS = 1e-4  # a sign, or a root of a small sum, amplifies rounding
KINDS = {
    "adamw": ["exp_avg", "exp_avg_sq"],
    "adafactor": ["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"],
    "lion": ["exp_avg"],
    "muon": ["exp_avg", "exp_avg_sq"],
}


Case = tuple[int, str, str, str]


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


def train(engine: Engine, first: int, steps: int, rate: float) -> list[StepResult]:
    batches = (share(global_batch(first + i), engine.grid) for i in range(steps))
    return [engine.train_step(batch, rate) for batch in batches]


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
    zero: int,
    precision: str,
    offload: str,
    optimizer: str,
    folder: Path,
    control_group: ControlGroup,
) -> Examined:
    settings = {"tensor": 2, "zero": zero, "precision": precision, **(OFFLOADS | KEPT)[offload]}
    settings["optimizer"] = {"name": optimizer}
    rate = OTHERS.get(optimizer, RATE)
    engine = build_engine(run_config(**settings))
    train(engine, 0, BEFORE, rate)
    checkpoint = save(engine, folder, control_group)
    steps = engine.state.steps
    undisturbed = curve(train(engine, BEFORE, AFTER, rate))
    last_weights = fp32_weights(engine)
    engine.state.reset()
    reset_steps = engine.state.steps

    other = build_engine(run_config(seed=2, **settings))
    stored = StoredParameters(checkpoint)
    other.state.load(stored, steps)
    with not_finite(other):
        before = fp32_weights(other)
        skipped = [not result.applied for result in train(other, 50, 2, rate)]
        unchanged = equal(before, fp32_weights(other))
    resumed = curve(train(other, BEFORE, AFTER, rate))
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
        curve(train(other, BEFORE, AFTER, rate)),
        curve(train(fresh, BEFORE, AFTER, rate)),
        reset_steps,
        skipped,
        unchanged,
        resumed,
    )


def examine_all(cases: list[Case], folder: str) -> dict[Case, Examined]:
    with process_group():
        start_process_grid(2)
        control_group = ControlGroup()
        return {
            case: examine(*case, Path(folder, "-".join(map(str, case))), control_group)
            for case in cases
        }


@once
def examined(quick: bool) -> list[dict[Case, Examined]]:
    folder = tempfile.mkdtemp(prefix="megaphase-states-")
    try:
        return run_ranks(examine_all, PROCESSES, QUICK if quick else SLOW, folder, timeout=600)
    finally:
        shutil.rmtree(folder)


def by_rank(case: Case) -> list[Examined]:
    return [results[case] for results in examined(case in QUICK)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", PARAMETERS, ids=str)
def test_what_was_saved_goes_on_bit_for_bit(case: Case) -> None:
    found = by_rank(case)[0]
    assert found.steps == BEFORE
    assert found.resumed == found.undisturbed
    assert all(rank.same_weights for rank in by_rank(case))


@pytest.mark.distributed
@pytest.mark.parametrize("case", PARAMETERS, ids=str)
def test_a_reset_leaves_a_fresh_optimizer(case: Case) -> None:
    found = by_rank(case)[0]
    assert found.reset_steps == 0
    assert found.after_reset == found.fresh
    assert found.after_reset != found.undisturbed


@pytest.mark.distributed
@pytest.mark.parametrize("case", PARAMETERS, ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(case: Case) -> None:
    # The steps after it are those of an engine that never saw it, for which see above.
    assert by_rank(case)[0].skipped == [True, True]
    assert all(rank.skip_changed_nothing for rank in by_rank(case))


def hop(name: str, hops: list[tuple[int, int]], folder: str) -> tuple[list[float], list[float]]:
    """Return a curve on one layout throughout, and one that changes it every two steps."""
    model = {"kv_heads": 4, "vocab": 99}  # 99: every size pads its rows differently
    optimizer, rate = {"name": name}, OTHERS.get(name, RATE)
    with process_group():
        start_process_grid(1)
        control_group = ControlGroup()
        still = still_at_the_start(model, optimizer)
        still_curve = [
            result.losses.mean
            for i in range(len(hops) * HOP_STEPS)
            for result in [still.train_step(share(batch(i), still.grid), rate)]
        ]
        curve: list[float] = []
        checkpoint, steps = None, 0
        for number, (tensor, zero) in enumerate(hops):
            layout = {"tensor": tensor, "zero": zero}
            config = run_config(model=model, seed=number, optimizer=optimizer, **layout)
            engine = build_engine(config, 99)
            if checkpoint is None:
                engine = still_at_the_start(model, optimizer)
            else:
                engine.state.load(StoredParameters(checkpoint), steps)
            for _ in range(HOP_STEPS):
                result = engine.train_step(share(batch(len(curve)), engine.grid), rate)
                curve.append(result.losses.mean)
            checkpoint, steps = (
                save_whole(engine, config, 99, Path(folder, str(number)), control_group),
                engine.state.steps,
            )
        return still_curve, curve


def still_at_the_start(model: dict[str, Any], optimizer: dict[str, Any]) -> Engine:
    return build_engine(run_config(model=model, optimizer=optimizer, tensor=1, zero=0), 99)


def batch(step: int):  # type: ignore[no-untyped-def]
    return global_batch(step, vocab=99)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "hops", "rel"),
    [
        ("adamw", HOPS, FP32),
        ("muon", FEW_HOPS, FP32_OF_OTHERS),
        *(pytest.param(name, HOPS, FP32_OF_OTHERS, marks=pytest.mark.slow) for name in OTHERS),
    ],
)
def test_a_run_goes_on_on_any_layout(name: str, hops: list[tuple[int, int]], rel: float) -> None:
    folder = tempfile.mkdtemp(prefix="megaphase-hops-")
    try:
        for still, hopping in run_ranks(hop, PROCESSES, name, hops, folder, timeout=600):
            assert len(still) == len(hopping) == len(hops) * HOP_STEPS
            assert hopping == pytest.approx(still, rel=rel)
        _check_files(Path(folder, str(hops.index((4, 3))), "step-00000001"), KINDS[name])
    finally:
        shutil.rmtree(folder)


def _check_files(checkpoint: Path, kinds: list[str]) -> None:
    """Check, with other code, that every element is stored once, as documented, and reshape it."""
    index = json.loads((checkpoint / INDEX_FILE).read_text())
    assert index["kinds"] == ["weight", *kinds]
    stored = StoredParameters(checkpoint)
    found = whole_parameters(checkpoint)
    assert found.keys() == index["parameters"].keys()
    for name, whole in found.items():
        assert torch.equal(whole, stored.whole(name, "weight")), name
    for number, layout in enumerate([Layout(2, 2, 1), Layout(2, 1, 3), None]):
        out = checkpoint.parent / f"reshaped-{number}"
        reshape(str(checkpoint), out, layout, weights_only=False, workers=1)
        reshaped = StoredParameters(out)
        reshaped.check_pieces()
        assert reshaped.kinds_by_name == stored.kinds_by_name
        for name, of_parameter in stored.kinds_by_name.items():
            for kind in of_parameter:
                assert torch.equal(reshaped.whole(name, kind), stored.whole(name, kind)), name
