"""The curves of a sweep's runs: losses, tokens and epochs at every validation.

A branch begins with the curve of the run from which it started, which may be a branch itself. Only
the displayed values of a run are kept, so that a sweep of hundreds of long runs fits into memory.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megaphase.report.load_run import load_run
from megaphase.report.plot_parts import Curve
from megaphase.report.runs import PhasePlan, RunRecord, ValidationRow
from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.pareto.points import Point, reason_of_failure
from megaphase.sweep.trials import Trial
from megaphase.utils.errors import InputError

ByTask = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class RunCurves:
    """Values at the validations of a run and of all runs before it.

    Attributes:
        steps: steps of the validations, ascending, over all of these runs.
        switches: steps done when each phase but the first began, ascending.
        validation: loss by task; of the average of the weights, where there is one.
        training: mean loss since the previous validation, by task; NaN if it was not trained on.
        tokens, epochs: of training text so far, by task.
    """

    steps: Sequence[int]
    switches: Sequence[int]
    validation: ByTask
    training: ByTask
    tokens: ByTask
    epochs: ByTask

    def at(self, step: int) -> int:
        """Return the index of the validation after `step` steps.

        Raises:
            ValueError: there was none.
        """
        at = bisect_left(self.steps, step)
        if at == len(self.steps) or self.steps[at] != step:
            raise ValueError(f"no validation after step {step}")
        return at


class SweepRuns(NamedTuple):
    """What a report needs of the run directories of a sweep, each of which is read once.

    curves: of all final runs that have ended normally, by name.
    phases: as they were trained, of these runs and of those from which they started, by name.
    """

    curves: dict[str, RunCurves]
    phases: dict[str, list[PhasePlan]]


def read_runs(record: SweepRecord) -> SweepRuns:
    """Read the directories of all final runs that have ended normally, and of their sources.

    Raises:
        InputError: the directory of one of them is damaged.
    """
    tasks = [*record.sweep.high, *record.sweep.low]
    trials = {trial.name: trial for trial in record.trials}
    sources: dict[str, RunCurves] = {}
    phases: dict[str, list[PhasePlan]] = {}

    def checked(curves: RunCurves, name: str, step: int) -> RunCurves:
        if step not in curves.steps:
            raise InputError(
                record.directory.metrics(name),
                f"has no validation after step {step:,}, so it is damaged",
                f"restore it; or remove {record.directory.run(name)} and "
                f"{record.directory.outcome_file(name)}, and give the sweep command again",
            )
        return curves

    def curves(trial: Trial) -> RunCurves:
        run = load_run(record.directory.run(trial.name))
        phases[trial.name] = run.plan.phases
        if trial.source is None:
            return _own_curves(run, tasks)
        if trial.source not in sources:
            sources[trial.source] = curves(trials[trial.source])
        source = checked(sources[trial.source], trial.source, run.origin.step)
        return _joined(source, _own_curves(run, tasks), run.origin.step)

    found = {
        trial.name: checked(curves(trial), trial.name, outcome.step)
        for trial in record.trials
        if trial.is_final
        and (outcome := record.outcomes.get(trial.name)) is not None
        and reason_of_failure(outcome) is None
    }
    return SweepRuns(found, phases)


def _own_curves(run: RunRecord, tasks: Sequence[str]) -> RunCurves:
    # A step that ends a phase and begins another has two rows of the same weights.
    rows = {row.step: row for row in run.validation}
    steps = list(rows)
    seen = {task: [_seen(run, task, step) for step in steps] for task in tasks}
    return RunCurves(
        steps=steps,
        switches=[step for step, _ in run.switches],
        validation={task: [_loss(row, task) for row in rows.values()] for task in tasks},
        training=_training_means(run, steps, tasks),
        tokens={task: [tokens for tokens, _ in values] for task, values in seen.items()},
        epochs={task: [epochs for _, epochs in values] for task, values in seen.items()},
    )


def _loss(row: ValidationRow, task: str) -> float:
    """Return the loss of what counts: of the average of the weights as soon as there is one."""
    measured = (row.validation_average or row.validation).get(task)
    return math.nan if measured is None else measured.loss


def _training_means(run: RunRecord, steps: Sequence[int], tasks: Sequence[str]) -> ByTask:
    """Return the mean training loss of every task between each validation and the previous one."""
    ends = steps[1:]
    means: dict[str, list[float]] = {}
    for task in tasks:
        rows, losses = run.training.of_task(task)
        after = np.searchsorted(ends, run.training.step[rows])
        counted = np.isfinite(losses) & (after < len(ends))
        sums, counts = (
            np.bincount(after[counted], weights, minlength=len(ends))
            for weights in (losses[counted], None)
        )
        means[task] = [math.nan, *np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)]
    return means


def _seen(run: RunRecord, task: str, step: int) -> tuple[float, float]:
    """Return this run's tokens, and the epochs over it and earlier runs, after `step` steps."""
    begin, tokens, epochs = run.origin.step, 0.0, 0.0
    for phase in run.plan.phases:
        share = phase.tasks.get(task)
        part = 0.0 if share is None else phase.part(step - begin, task)
        begin += phase.steps
        if share is None:
            continue
        # At every step the task has had its rate within one sample, as the plan guarantees.
        tokens += part * share.tokens
        epochs = max(epochs, share.epochs_so_far - (1 - part) * share.epochs)
    return tokens, epochs


def _joined(source: RunCurves, run: RunCurves, switch: int) -> RunCurves:
    """Return the source's curve up to the switch, followed by the run's own."""
    kept = bisect_left(source.steps, switch)
    end = bisect_right(source.steps, switch) - 1  # of the source, from which the run started

    def join(before: ByTask, after: ByTask) -> ByTask:
        return {task: [*before[task][:kept], *after[task]] for task in after}

    training = {task: list(values) for task, values in run.training.items()}
    for task, values in source.training.items():
        training[task][0] = values[end]  # the loss before the switch
    return RunCurves(
        steps=[*source.steps[:kept], *run.steps],
        switches=[*(step for step in source.switches if step < switch), *run.switches],
        validation=join(source.validation, run.validation),
        training=join(source.training, training),
        tokens=join(
            source.tokens,
            {
                task: [source.tokens[task][end] + n for n in values]
                for task, values in run.tokens.items()
            },
        ),
        epochs=join(
            source.epochs,
            {
                # Those of the run count from the beginning, but only of tasks that it trains on.
                task: [max(source.epochs[task][end], n) for n in values]
                for task, values in run.epochs.items()
            },
        ),
    )


Values = Callable[[RunCurves], ByTask]


def mean_curve(
    curves: Mapping[str, RunCurves], point: Point, tasks: Sequence[str], values: Values
) -> Curve:
    """Return the mean over a setting's seeds and over tasks, at the steps that all seeds have."""
    runs = [curves[trial.name] for trial, _ in point.runs]
    steps = sorted(set.intersection(*(set(run.steps) for run in runs)))
    every = [
        np.array(values(run)[task], dtype=np.float64)[[run.at(step) for step in steps]]
        for run in runs
        for task in tasks
    ]
    return np.array(steps, dtype=np.int64), np.mean(every, axis=0)
