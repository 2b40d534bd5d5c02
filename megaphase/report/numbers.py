"""Write every number of a report as CSV tables, one row per measurement, for other programs."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megaphase.report.losses import PhaseLoss, final_losses
from megaphase.report.runs import RunRecord, TaskShare, TrainingRow

Row = Sequence[Any]


def write_numbers(runs: Sequence[RunRecord], folder: Path) -> list[str]:
    """Write the tables into `folder`; return the names of the files.

    Losses are in nats per token; `run` is the first column everywhere.
    """
    loss_columns = [field.name for field in dataclasses.fields(PhaseLoss)]
    training_columns = [name for name in TrainingRow.model_fields if name != "loss_by_task"]
    tables = {
        "final_losses": (loss_columns, _final_losses),
        "validation": (["step", "phase", "task", "loss", "bits_per_byte", "gap"], _validation),
        "training": (training_columns, _training),
        "training_by_task": (["step", "phase", "task", "loss"], _training_by_task),
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


def _training(run: RunRecord) -> Iterator[Row]:
    for row in run.training:
        yield [value for name, value in row if name != "loss_by_task"]


def _training_by_task(run: RunRecord) -> Iterator[Row]:
    for row in run.training:
        for task, loss in row.loss_by_task.items():
            yield row.step, row.phase, task, loss


def _plan(run: RunRecord) -> Iterator[Row]:
    for phase in run.plan.phases:
        for task, share in phase.tasks.items():
            yield [phase.name, task, *(value for _, value in share)]
