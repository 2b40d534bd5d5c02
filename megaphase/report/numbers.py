"""Write every number of a report as CSV tables, one row per measurement, for other programs."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.report.losses import PhaseLoss, final_losses
from megaphase.report.runs import RunRecord, TaskShare
from megaphase.report.training_rows import TrainingRow

ROWS_OF_TRAINING = 20_000  # of a run; more would only make the folder larger
TRAINING_COLUMNS = [name for name in TrainingRow.model_fields if name != "loss_by_task"]
Row = Sequence[Any]


def write_numbers(runs: Sequence[RunRecord], folder: Path) -> list[str]:
    """Write the tables into `folder`; return the names of the files.

    Losses are in nats per token; `run` is the first column everywhere.
    """
    loss_columns = [field.name for field in dataclasses.fields(PhaseLoss)]
    tables = {
        "final_losses": (loss_columns, _final_losses),
        "validation": (["step", "phase", "task", "loss", "bits_per_byte", "gap"], _validation),
        "training": ([*TRAINING_COLUMNS, "steps"], _training),
        "training_by_task": (["step", "phase", "task", "loss", "steps"], _training_by_task),
        "plan": (["phase", "task", *TaskShare.model_fields], _plan),
    }
    if any(row.validation_average for run in runs for row in run.validation):
        columns = ["step", "phase", "task", "loss", "bits_per_byte"]
        tables["validation_average"] = columns, _validation_average
    if any(run.benchmarks for run in runs):
        tables["benchmarks"] = ["step", "phase", "task", "group", "metric", "value"], _benchmarks
    folder.mkdir()
    return [
        write_table(
            folder / f"{name}.csv",
            ["run", *columns],
            ([run.name, *row] for run in runs for row in rows(run)),
        )
        for name, (columns, rows) in tables.items()
    ]


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> str:
    """Write a CSV file; return its name."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    return path.name


def _final_losses(run: RunRecord) -> Iterator[Row]:
    return map(dataclasses.astuple, final_losses(run))


def _validation(run: RunRecord) -> Iterator[Row]:
    for row in run.validation:
        for task, measured in row.validation.items():
            yield row.step, row.phase, task, measured.loss, measured.bits_per_byte, measured.gap


def _validation_average(run: RunRecord) -> Iterator[Row]:
    for row in run.validation:
        for task, measured in row.validation_average.items():
            yield row.step, row.phase, task, measured.loss, measured.bits_per_byte


def _benchmarks(run: RunRecord) -> Iterator[Row]:
    """Of a row, either the task or the group is empty."""
    for row in run.benchmarks:
        for task, figures in row.benchmarks.items():
            for metric, value in figures.items():
                yield row.step, row.phase, task, "", metric, value
        for group, figures in row.benchmark_groups.items():
            for metric, value in figures.items():
                yield row.step, row.phase, "", group, metric, value


def steps_of_a_row(run: RunRecord) -> int:
    """Return of how many steps a row of `training` is the mean, so that long runs have few."""
    return max(1, -(-len(run.training) // ROWS_OF_TRAINING))


def _training(run: RunRecord) -> Iterator[Row]:
    """Whole numbers are those of the last of the row's steps, others means of finite values."""
    rows = run.training
    lasts, counts, stretch = _stretches(run, np.arange(len(rows)))

    def column(name: str) -> list[Any]:
        values: np.ndarray = getattr(rows, name)
        if name == "phase":
            return [rows.phases[i] for i in values[lasts]]
        if values.dtype == np.int64:
            return list(values[lasts].tolist())
        if name == "mfu" and np.isnan(values).all():
            return [""] * len(lasts)
        return list(_means(values, stretch, len(lasts)).tolist())

    return zip(*map(column, TRAINING_COLUMNS), counts.tolist(), strict=True)


def _training_by_task(run: RunRecord) -> Iterator[Row]:
    rows = run.training
    found = []
    for order, (task, (indices, losses)) in enumerate(rows.loss_by_task.items()):
        lasts, counts, stretch = _stretches(run, indices)
        means = _means(losses, stretch, len(lasts))
        for i, loss, count in zip(indices[lasts], means.tolist(), counts.tolist(), strict=True):
            step, phase = int(rows.step[i]), rows.phases[rows.phase[i]]
            found.append((step, order, (step, phase, task, loss, count)))
    return (row for _, _, row in sorted(found, key=lambda each: each[:2]))


def _stretches(run: RunRecord, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide rows of training, given by their indices, into stretches of `steps_of_a_row` steps.

    Returns the last row of every stretch and its number of rows, both [stretches], and the stretch
    of every row, as indices into `rows`.
    """
    training = run.training
    number = (training.phase_step[rows] - 1) // steps_of_a_row(run)
    keys = np.stack([training.phase[rows], number])
    begins = np.append(True, np.any(np.diff(keys) != 0, axis=0))[: len(rows)]
    stretch = np.cumsum(begins) - 1
    lasts = np.flatnonzero(np.append(begins[1:], True)[: len(rows)])
    return lasts, np.bincount(stretch, minlength=len(lasts)), stretch


def _means(values: np.ndarray, stretch: np.ndarray, stretches: int) -> np.ndarray:
    """Return the mean of the finite values of every stretch of several rows; NaN without one."""
    if stretches == len(values):
        return values
    finite = np.isfinite(values)
    sums = np.bincount(stretch[finite], values[finite], minlength=stretches)
    counts = np.bincount(stretch[finite], minlength=stretches)
    means = np.full(stretches, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def _plan(run: RunRecord) -> Iterator[Row]:
    for phase in run.plan.phases:
        for task, share in phase.tasks.items():
            yield [phase.name, task, *(value for _, value in share)]
