"""Dropout compared with a plain model whose masks are computed word by word, and in real runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from distributed import once, run_ranks
from engine_support import (
    CANCELLATION,
    CLIP,
    MODEL,
    SAMPLES,
    SEQ_LEN,
    TASKS,
    build_engine,
    fp32_weights,
    global_batch,
    run_config,
    share,
)
from plain_gpt import IGNORED, PlainAdamW, PlainGPT, PlainShape
from rounding import FP32
from run_support import STEPS, make_corpora, read_rows, run_settings, timeless, write_run_file
from torch import Tensor
from warm_commands import run_killed, run_well

from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.distributed.tensor_region import TensorRegion
from megaphase.estimate.setup import Setup
from megaphase.model.dropout import Dropout, row_seeds
from megaphase.model.shape import GPTShape

SEED = 1
SHARE = 0.3
FIRST_STEP, LAST_STEP = 7, 10
RATE = 3e-3
VALIDATION_BATCH = 999
ALONE = TensorRegion(ProcessGrid(1, 0, 1, None, None), False)  # type: ignore[arg-type]  # no groups


@dataclass(frozen=True)
class Case:
    tensor: int = 1
    data: int = 1
    zero: int = 0
    sequence: bool = False
    micro: int = 4
    checkpointing: str = "none"


CASES = [
    Case(),
    Case(micro=1, zero=3, checkpointing="full"),
    Case(data=2, micro=2),
    Case(tensor=2, micro=8),
    Case(tensor=2, sequence=True, zero=3, checkpointing="full"),
]


@dataclass(frozen=True)
class Curve:
    """Mean loss and gradient norm of every step, and the validation losses after them."""

    steps: list[tuple[float, float]]
    validation: dict[str, float]
    weights_before: dict[str, Tensor]


def train_curves(cases: list[Case]) -> list[Curve]:
    """Run on a rank: train one engine after the other."""
    with process_group():
        return [_train(case) for case in cases]


def _train(case: Case) -> Curve:
    engine = build_engine(
        run_config(
            model={"dropout": SHARE, "activation_checkpointing": case.checkpointing},
            seed=SEED,
            micro=case.micro,
            tensor=case.tensor,
            zero=case.zero,
            sequence=case.sequence,
        )
    )
    before, steps = fp32_weights(engine), []
    for step in range(FIRST_STEP, LAST_STEP):
        result = engine.train_step(share(global_batch(step), engine.grid), RATE, step)
        steps.append((result.losses.mean, result.grad_norm))
    validation = engine.evaluate(share(global_batch(VALIDATION_BATCH), engine.grid))
    return Curve(steps, validation.by_task(TASKS), before)


@once
def curves(processes: int) -> dict[Case, Curve]:
    """Return all cases of one number of processes, from rank 0."""
    cases = [each for each in CASES if each.tensor * each.data == processes]
    return dict(zip(cases, run_ranks(train_curves, processes, cases)[0], strict=True))


class DroppingGPT(PlainGPT):
    """Drops the elements masked in a step; nothing if there is no step."""

    step: int | None = None

    def dropped(self, x: Tensor, place: str) -> Tensor:
        if self.step is None:
            return x
        masks = [plain_mask(self.step, row, place, x[0].numel()) for row in range(len(x))]
        kept = 1 - round(SHARE * 65536) / 65536
        return x * torch.tensor(masks).view(x.shape) / kept


def plain_mask(step: int, row: int, place: str, elements: int) -> list[int]:
    """Return 1 for kept elements, as defined in megaphase/model/dropout.py, in Python's
    integers."""
    first = key(SEED, "dropout", "row", step, row) // 2 + key(0, "dropout", "place", place) // 2
    kept = []
    for number in range(elements // 4):
        word = (first + number * 0x9E3779B97F4A7C15) % 2**64
        word ^= word >> 32
        for _ in range(2):
            word = word * 0xD6E8FEB86659FD93 % 2**64
            word ^= word >> 32
        levels = [((word >> shift) + 2**15) % 2**16 for shift in (0, 16, 32, 48)]
        kept += [int(level >= round(SHARE * 2**16)) for level in levels]
    return kept


def key(*purpose: Any) -> int:
    text = "\0".join(map(str, purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@once
def plain_curve() -> Curve:
    weights = curves(1)[CASES[0]].weights_before
    model = DroppingGPT(weights, PlainShape(MODEL["layers"], MODEL["heads"], MODEL["heads"]))
    optimizer = PlainAdamW(model.weights, clip=CLIP)
    steps = []
    for step in range(FIRST_STEP, LAST_STEP):
        model.step = step
        batch = global_batch(step)
        loss = model.losses(batch.inputs, batch.targets).mean()
        gradients = torch.autograd.grad(loss, list(model.weights.values()))
        norm = optimizer.step(dict(zip(model.weights, gradients, strict=True)), RATE)
        steps.append((float(loss.detach()), norm))
    model.step = None
    batch = global_batch(VALIDATION_BATCH)
    losses = model.losses(batch.inputs, batch.targets).detach()
    assert (batch.targets != IGNORED).all()
    validation = {
        task: float(losses[batch.tasks == number].mean()) for number, task in enumerate(TASKS)
    }
    return Curve(steps, validation, weights)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_has_the_curve_of_the_plain_model_and_validates_without(case: Case) -> None:
    native, plain = curves(case.tensor * case.data)[case], plain_curve()
    assert native.steps == [
        (pytest.approx(loss, rel=FP32), pytest.approx(norm, rel=CANCELLATION * FP32))
        for loss, norm in plain.steps
    ]
    assert native.validation == pytest.approx(plain.validation, rel=FP32)


def test_masks_have_the_share_and_are_those_of_row_step_and_place_alone() -> None:
    rows, elements = 4, 300 * 257
    x = torch.ones(rows, 300, 257)
    for dropout in (0.1, 0.5):
        seeds = {step: row_seeds(SEED, step, range(rows)) for step in (1, 2)}
        found = [
            Dropout(dropout, place, ALONE)(x, seeds[step]) == 0
            for place, step in (("a", 1), ("a", 2), ("b", 1))
        ]
        masks = torch.cat(found).flatten(1).double()
        assert masks.mean(1) == pytest.approx(dropout, abs=5 * (dropout / elements) ** 0.5)
        covariance = torch.corrcoef(masks) - torch.eye(len(masks))
        assert covariance.abs().max() < 5 / elements**0.5
        alone = Dropout(dropout, "a", ALONE)(x[2:3], row_seeds(SEED, 1, range(2, 3)))
        assert torch.equal(alone[0] == 0, found[0][2])


@pytest.mark.parametrize("dropout", [0.0, 1e-6, 0.25, 1 - 1e-9])
def test_what_stays_is_scaled_so_that_the_mean_does(dropout: float) -> None:
    y = Dropout(dropout, "a", ALONE)(torch.ones(1, 64, 32), row_seeds(SEED, 1, range(1)))
    levels = min(65535, round(dropout * 65536))
    assert y[y != 0].tolist() == pytest.approx([65536 / (65536 - levels)] * int((y != 0).sum()))
    assert bool((y == 0).any()) == (levels > 0)


def test_without_seeds_nothing_is_touched() -> None:
    x = torch.ones(2, 4, 8)
    assert Dropout(0.5, "a", ALONE)(x, None) is x


def test_a_place_keeps_one_byte_an_element_as_the_estimate_says() -> None:
    shape = GPTShape(32, SEQ_LEN, 1, 32, 4, 4, 48, dropout=SHARE)
    setup = Setup(shape, 1, 1, 0, False, True, micro=SAMPLES, accumulation=1)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.ones(SAMPLES, SEQ_LEN, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dropout = Dropout(SHARE, "a", ALONE)
        dropout(x, row_seeds(SEED, 1, range(SAMPLES)))
    assert sum(each.nbytes for each in kept) == dropout.saved_bytes(setup, 32) == x.numel()


def test_dropout_is_no_fact_of_the_weights() -> None:
    shape = GPTShape(32, SEQ_LEN, 1, 32, 4, 4, 48, dropout=SHARE)
    assert "dropout" not in shape.architecture()
    assert GPTShape.from_architecture(shape.architecture()).dropout == 0.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with the uninterrupted run of both phases, and its settings."""
    folder = tmp_path_factory.mktemp("runs")
    settings = run_settings(make_corpora(folder / "corpora"))
    settings["model"]["dropout"] = SHARE
    run_well("train", write_run_file(folder / "whole", settings))
    return folder, settings


def figures(folder, name):
    """Return losses and validations of the second phase."""
    rows = timeless(read_rows(folder / name / "run"))
    return [row for row in rows if row.get("phase") == "joint" and "event" not in row]


def branch(runs, name, dropout):
    """Return a run file of the second phase alone, and the options that make it a branch."""
    folder, settings = runs
    settings = settings | {"phases": settings["phases"][1:]}
    settings["model"] = settings["model"] | {"dropout": dropout}
    run_file = write_run_file(folder / name, settings)
    return run_file, "--from", f"{folder / 'whole' / 'run'}@pretrain"


def test_a_branch_and_its_resumption_have_the_masks_of_the_whole_run(runs):
    folder, _ = runs
    command = branch(runs, "same", SHARE)
    run_killed(*command, "checkpoint.asynchronous=false", before_step=STEPS[0] + 7)
    assert "step-00000016" in run_well("train", *command)
    assert figures(folder, "same") == figures(folder, "whole")


def test_a_branch_may_have_another_dropout(runs):
    folder, _ = runs
    run_well("train", *branch(runs, "other", 0.0))
    native, whole = figures(folder, "other"), figures(folder, "whole")
    assert native[0] == whole[0]  # the validation at its beginning
    assert native[1]["step"] == whole[1]["step"]
    assert native[1]["loss"] != whole[1]["loss"]
