"""The rows of a run's optimizer steps as columns: a long run has millions of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from megaphase.report.measured import Measured
from megaphase.utils.metrics_rows import MOST_STEPS, Row

# Rows are converted some at a time, and one by one only where that fails.
_ROWS_AT_A_TIME = 256


class TrainingRow(BaseModel):
    """One optimizer step; losses in nats per token, `step` counts from 1 over the whole run."""

    step: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    phase: str
    phase_step: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    tokens: Annotated[int, Field(ge=0, le=MOST_STEPS)]
    loss: Measured
    loss_by_task: dict[str, Measured]
    learning_rate: float
    grad_norm: Measured
    step_seconds: float
    data_wait_seconds: float
    tokens_per_second: float
    mfu: float | None = None


_INTEGERS = {"step": 1, "phase_step": 1, "tokens": 0}  # with the least that each can be
_MEASURED = ("loss", "grad_norm")
_FLOATS = ("learning_rate", "step_seconds", "data_wait_seconds", "tokens_per_second")
_required = itemgetter("phase", "loss_by_task", *_INTEGERS, *_MEASURED, *_FLOATS)


class TaskLosses(NamedTuple):
    """A task's losses in the rows that have one: the rows' indices and the losses, both [m]."""

    rows: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class TrainingRows:
    """The columns of n rows as in `TrainingRow`, in the order of their steps, each step once.

    Whole numbers are int64 [n], others float64 [n], with NaN for a value that is not finite and
    for an `mfu` that is not known.

    Attributes:
        phases: names of phases; phase: of every row, an index into them, int64 [n].
    """

    phases: Sequence[str]
    phase: np.ndarray
    step: np.ndarray
    phase_step: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    learning_rate: np.ndarray
    grad_norm: np.ndarray
    step_seconds: np.ndarray
    data_wait_seconds: np.ndarray
    tokens_per_second: np.ndarray
    mfu: np.ndarray
    loss_by_task: Mapping[str, TaskLosses]

    def __len__(self) -> int:
        return len(self.step)

    def are_of(self, phase: str) -> np.ndarray:
        """Return for every row whether it is of a phase; bool [n]."""
        if phase not in self.phases:
            return np.zeros(len(self), dtype=bool)
        found: np.ndarray = self.phase == self.phases.index(phase)
        return found

    def of_task(self, task: str) -> TaskLosses:
        """Return a task's losses, which may be none."""
        nothing = TaskLosses(np.empty(0, dtype=np.int64), np.empty(0))
        return self.loss_by_task.get(task, nothing)


class TrainingRowsReader:
    """Collects rows in any order; of several with the same step the last one counts.

    Attributes:
        unreadable: how many were left out, since they are not rows of training.
    """

    def __init__(self) -> None:
        self.unreadable = 0
        self._phases: dict[str, int] = {}
        self._waiting: list[Row] = []
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
        self._by_task: dict[str, list[TaskLosses]] = {}
        self._count = 0

    def add(self, row: Row) -> None:
        self._waiting.append(row)
        if len(self._waiting) == _ROWS_AT_A_TIME:
            self._convert()

    def _convert(self) -> None:
        rows, self._waiting = self._waiting, []
        if not rows:
            return
        try:
            self._append(rows)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            valid = []
            for row in rows:
                with suppress(ValidationError):
                    valid.append(TrainingRow.model_validate(row).model_dump())
            self.unreadable += len(rows) - len(valid)
            if valid:
                self._append(valid)

    def _append(self, rows: Sequence[Row]) -> None:
        """Add rows; raise one of the errors above, and add none, if one may not be valid."""
        phases, losses, *values = zip(*map(_required, rows), strict=True)
        columns = {
            **{name: _whole(values[i], least) for i, (name, least) in enumerate(_INTEGERS.items())},
            **{name: _numbers(values[3 + i]) for i, name in enumerate(_MEASURED)},
            **{name: _numbers(values[5 + i], known=True) for i, name in enumerate(_FLOATS)},
            "mfu": _numbers([row.get("mfu") for row in rows]),
        }
        if not all(type(phase) is str for phase in set(phases)):
            raise TypeError(phases)
        by_task = _by_task(losses)
        codes = [self._phases.setdefault(phase, len(self._phases)) for phase in phases]
        columns["phase"] = np.array(codes, dtype=np.int64)
        for name, column in columns.items():
            self._columns[name].append(column)
        for task, (indices, found) in by_task:
            self._by_task.setdefault(task, []).append(TaskLosses(self._count + indices, found))
        self._count += len(rows)

    def finish(self) -> TrainingRows:
        """Return all rows."""
        self._convert()
        joined = {
            name: np.concatenate(parts) if parts else np.empty(0, dtype=_COLUMNS[name])
            for name, parts in self._columns.items()
        }
        by_task = {
            task: TaskLosses(*map(np.concatenate, zip(*parts, strict=True)))
            for task, parts in self._by_task.items()
        }
        if np.all(np.diff(joined["step"]) > 0):
            in_order = {task: _sorted(found) for task, found in by_task.items()}
            return TrainingRows(phases=tuple(self._phases), loss_by_task=in_order, **joined)
        order = np.argsort(joined["step"], kind="stable")
        sorted_steps = joined["step"][order]
        kept = order[np.append(sorted_steps[1:] != sorted_steps[:-1], True)]
        place = np.full(self._count, -1)
        place[kept] = np.arange(len(kept))
        return TrainingRows(
            phases=tuple(self._phases),
            loss_by_task={
                task: _sorted(TaskLosses(place[rows], losses))
                for task, (rows, losses) in by_task.items()
            },
            **{name: column[kept] for name, column in joined.items()},
        )


_COLUMNS: Mapping[str, type] = {
    field.name: np.int64 if field.name in (*_INTEGERS, "phase") else np.float64
    for field in fields(TrainingRows)
    if field.name not in ("phases", "loss_by_task")
}


def _whole(values: Sequence[Any], least: int) -> np.ndarray:
    found = np.array(values)
    if found.dtype != np.int64 or found.min(initial=least) < least:
        raise TypeError(found.dtype)
    return found


def _numbers(values: Sequence[Any], known: bool = False) -> np.ndarray:
    """Return float64 [n], with NaN for None; known: None is an error."""
    if known and None in values:
        raise TypeError(None)
    found = np.array(values, dtype=np.float64)
    if found.ndim != 1:
        raise TypeError(found.shape)
    return found


def _by_task(losses: Sequence[Mapping[str, Any]]) -> list[tuple[str, TaskLosses]]:
    """Return the losses of every task; a task may occur several times."""
    alike: dict[tuple[str, ...], tuple[list[int], list[tuple[Any, ...]]]] = {}
    for i, each in enumerate(losses):
        indices, values = alike.setdefault(tuple(each), ([], []))
        indices.append(i)
        values.append(tuple(each.values()))
    found = []
    for tasks, (indices, values) in alike.items():
        table = np.array(values, dtype=np.float64)
        if table.shape != (len(indices), len(tasks)):
            raise TypeError(table.shape)
        rows = np.array(indices, dtype=np.int64)
        found += [(task, TaskLosses(rows, table[:, i])) for i, task in enumerate(tasks)]
    return found


def _sorted(found: TaskLosses) -> TaskLosses:
    """Return the losses in the order of their rows, without rows that are not kept."""
    rows, losses = found
    if len(rows) and (rows[0] < 0 or np.any(np.diff(rows) <= 0)):
        order = np.argsort(rows, kind="stable")
        order = order[rows[order] >= 0]
        return TaskLosses(rows[order], losses[order])
    return found
