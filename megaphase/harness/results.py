"""The figures of benchmarks, by task and by group of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

from rich.table import Table

Groups = Mapping[str, Sequence[str]]
"""Names or patterns of tasks (`*_eng_Latn`) by group, such as a language."""


@dataclass(frozen=True)
class TaskResult:
    """The result of a task.

    Attributes:
        figures: by metric, such as acc; with the filter after a comma where it is not `none`.
        standard_errors: of the figures that have one.
        samples: number of documents. fewshot: number of examples in the context.
        version: of the task's definition; None if it names none.
    """

    figures: dict[str, float]
    standard_errors: dict[str, float]
    samples: int
    fewshot: int
    version: str | None = None


@dataclass(frozen=True)
class GroupResult:
    """The mean of each metric over the tasks of a group that have it, unweighted."""

    tasks: list[str]
    figures: dict[str, float]


@dataclass(frozen=True)
class BenchmarkResults:
    """The results of a model. harness: the version of lm-evaluation-harness."""

    tasks: dict[str, TaskResult]
    groups: dict[str, GroupResult]
    harness: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def results_of(found: Mapping[str, Any], groups: Groups, harness: str) -> BenchmarkResults:
    """Return the results that `lm_eval` gives, for every task without the groups of its own."""
    tasks = {
        name: _task(found["results"][name], found["n-samples"][name], found["n-shot"].get(name))
        for name in found["n-samples"]
    }
    versions = found.get("versions", {})
    tasks = {
        name: TaskResult(**(vars(each) | {"version": _version(versions.get(name))}))
        for name, each in tasks.items()
    }
    return BenchmarkResults(tasks, grouped(tasks, groups), harness)


def _version(version: object) -> str | None:
    return None if version in (None, "N/A", "Yaml") else str(version)


def _task(figures: Mapping[str, Any], samples: Mapping[str, int], shots: int | None) -> TaskResult:
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in figures.items():
        metric, comma, kind = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        into, metric = (
            (errors, metric.removesuffix("_stderr"))
            if metric.endswith("_stderr")
            else (values, metric)
        )
        into[metric if kind == "none" else f"{metric},{kind}"] = float(value)
    return TaskResult(values, errors, samples["effective"], shots or 0)


def grouped(tasks: Mapping[str, TaskResult], groups: Groups) -> dict[str, GroupResult]:
    """Return the means of the groups, in their order; groups without a task are left out."""
    found = {}
    for group, patterns in groups.items():
        members = [name for name in tasks if any(fnmatchcase(name, each) for each in patterns)]
        metrics = dict.fromkeys(metric for name in members for metric in tasks[name].figures)
        figures = {
            metric: fmean(
                tasks[name].figures[metric] for name in members if metric in tasks[name].figures
            )
            for metric in metrics
        }
        if members:
            found[group] = GroupResult(members, figures)
    return found


def results_table(results: BenchmarkResults, title: str) -> Table:
    """Return a table with one row for each metric of each task, and those of the groups."""
    table = Table(title=title, title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    for column in ("value", "± error", "samples", "shots"):
        table.add_column(column, justify="right")
    for name, task in results.tasks.items():
        for metric, value in task.figures.items():
            error = task.standard_errors.get(metric)
            written = "" if error is None else f"{error:.4f}"
            counts = f"{task.samples:,}", str(task.fewshot)
            table.add_row(name, metric, f"{value:.4f}", written, *counts)
    for number, (name, group) in enumerate(results.groups.items()):
        if number == 0:
            table.add_section()
        for metric, value in group.figures.items():
            count = len(group.tasks)
            mean = f"mean of {count} task{'s' * (count > 1)}"
            table.add_row(f"{name}: {mean}", metric, f"{value:.4f}", "", "", "")
    return table
