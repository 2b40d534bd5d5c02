"""Every number of a report as CSV tables, one row per measurement, for any other program."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megaphase.experiments.losses import PhaseLoss, final_losses
from megaphase.experiments.runs import RunRecord, TaskShare

TRAINING_COLUMNS = (
    "step", "phase", "phase_step", "tokens", "loss", "learning_rate", "grad_norm",
    "step_seconds", "tokens_per_second", "mfu",
)  # fmt: skip


def write_numbers(runs: Sequence[RunRecord], folder: Path) -> None:
    """Write `final_losses`, `validation`, `training`, `training_by_task` and `plan` `.csv`.

    Losses are in nats per token; `run` is the first column everywhere.
    """
    folder.mkdir()
    loss_columns = [field.name for field in dataclasses.fields(PhaseLoss)]
    share_columns = [field.name for field in dataclasses.fields(TaskShare)]
    tables: dict[str, tuple[Sequence[str], Iterable[Sequence[Any]]]] = {
        "final_losses": (["run", *loss_columns], _final_losses(runs)),
        "validation": (["run", "step", "phase", "task", "loss", "bits_per_byte"], _curves(runs)),
        "training": (["run", *TRAINING_COLUMNS], _training(runs)),
        "training_by_task": (["run", "step", "phase", "task", "loss"], _training_by_task(runs)),
        "plan": (["run", "phase", "task", *share_columns], _plan(runs)),
    }
    for name, (columns, rows) in tables.items():
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)


def _final_losses(runs: Sequence[RunRecord]) -> Iterator[Sequence[Any]]:
    for run in runs:
        for loss in final_losses(run):
            yield run.name, *dataclasses.astuple(loss)


def _curves(runs: Sequence[RunRecord]) -> Iterator[Sequence[Any]]:
    for run in runs:
        for row in run.validation:
            for task, loss in row.loss.items():
                yield run.name, row.step, row.phase, task, loss, row.bits_per_byte[task]


def _training(runs: Sequence[RunRecord]) -> Iterator[Sequence[Any]]:
    for run in runs:
        for row in run.training:
            yield run.name, *(getattr(row, column) for column in TRAINING_COLUMNS)


def _training_by_task(runs: Sequence[RunRecord]) -> Iterator[Sequence[Any]]:
    for run in runs:
        for row in run.training:
            for task, loss in row.loss_by_task.items():
                yield run.name, row.step, row.phase, task, loss


def _plan(runs: Sequence[RunRecord]) -> Iterator[Sequence[Any]]:
    for run in runs:
        for phase in run.plan.phases:
            for task, share in phase.tasks.items():
                yield run.name, phase.name, task, *dataclasses.astuple(share)
