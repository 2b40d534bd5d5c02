"""The names under which trackers show a run's numbers: metric, task and phase."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megaphase.utils.metrics_rows import Row

_PLACE = ("step", "phase", "phase_step", "event")  # no metrics


def metrics(row: Row) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl by name; None and text are left out.

    A training step: `train_loss/TASK/PHASE`, and `train/KEY/PHASE` for the other keys. A
    validation: `validation_KEY/TASK/PHASE`. Benchmarks: `benchmarks_METRIC/TASK/PHASE`. An event:
    `events/NAME/PHASE`, which is 1.
    """
    phase = row.get("phase")
    ending = "" if phase is None else f"/{phase}"
    return {f"{name}{ending}": value for name, value in _numbers(row)}


def event_text(row: Row) -> str:
    """The facts of an event as JSON in one line, without its name and step."""
    facts = {key: value for key, value in row.items() if key not in ("step", "event")}
    return json.dumps(facts, ensure_ascii=False)


def _numbers(row: Row) -> Iterator[tuple[str, float]]:
    if "event" in row:
        yield f"events/{row['event']}", 1
        return
    for key, value in row.items():
        if key in _PLACE:
            continue
        if key == "loss_by_task":
            yield from _of_tasks("train_loss", value)
        elif isinstance(value, dict):
            for task, figures in value.items():
                if isinstance(figures, dict):
                    for name, figure in figures.items():
                        yield from _of_tasks(f"{key}_{name}", {task: figure})
                else:
                    yield from _of_tasks(key, {task: figures})
        elif isinstance(value, int | float):
            yield f"train/{key}", int(value) if value is True else value


def _of_tasks(name: str, figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for task, figure in figures.items():
        if isinstance(figure, int | float):
            yield f"{name}/{task}", figure
