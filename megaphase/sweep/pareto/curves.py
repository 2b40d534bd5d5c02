"""The curves of a sweep's runs: losses, tokens and epochs at every validation.

A branch begins with the curves of the runs from which it started. Only the displayed values of a
run are kept, so that a sweep of hundreds of long runs fits into memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np

from megaphase.report.load_run import load_run
from megaphase.report.plot_parts import Curve
from megaphase.report.runs import HeldOutRow, RunRecord
from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.pareto.points import Point, reason_of_failure
from megaphase.sweep.trials import Trial

ByTask = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class RunCurves:
    """Values at the validations of a run and of the runs from which it started.

    Attributes:
        steps: steps of the validations, ascending, over all of these runs.
        switch: steps done before the run's own first one; None without a first stage.
        validation: loss by task.
        training: mean loss since the previous validation, by task; NaN if it was not trained on.
        tokens, epochs: of training text so far, by task.
    """

    steps: Sequence[int]
    switch: int | None
    validation: ByTask
    training: ByTask
    tokens: ByTask
    epochs: ByTask

    def at(self, step: int) -> int:
        """Return the index of the validation after `step` steps.

        Raises:
            ValueError: there was none.
        """
        return self.steps.index(step)


def curves_of(record: SweepRecord) -> dict[str, RunCurves]:
    """Return the curves of all final runs that have ended normally, by name.

    Raises:
        InputError: the directory of one of them is damaged.
    """
    trials = {trial.name: trial for trial in record.trials}
    parts: dict[str, RunCurves] = {}  # of the runs from which others start
    found: dict[str, RunCurves] = {}
    for trial in record.trials:
        outcome = record.outcomes.get(trial.name)
        if trial.is_final and outcome is not None and reason_of_failure(outcome) is None:
            found[trial.name] = _curves(record, trials, trial.name, parts)
    return found


def _curves(
    record: SweepRecord, trials: Mapping[str, Trial], name: str, parts: dict[str, RunCurves]
) -> RunCurves:
    """Return the curves of a run and of all runs before it; parts: those known, added to."""
    if name in parts:
        return parts[name]
    tasks = [*record.sweep.high, *record.sweep.low]
    run = _own_curves(load_run(record.directory.run(name)), tasks)
    source = trials[name].source
    if source is not None:
        run = _joined(_curves(record, trials, source, parts), run)
    if not trials[name].is_final:
        parts[name] = run
    return run


def _own_curves(run: RunRecord, tasks: Sequence[str]) -> RunCurves:
    # A step that ends a phase and begins another has two rows of the same weights.
    rows = {row.step: row for row in run.validation}
    steps = list(rows)
    seen = {task: [_seen(run, task, step) for step in steps] for task in tasks}
    return RunCurves(
        steps=steps,
        switch=run.origin.step or None,
        validation={
            task: [_loss(row.validation.get(task)) for row in rows.values()] for task in tasks
        },
        training=_training_means(run, steps, tasks),
        tokens={task: [tokens for tokens, _ in values] for task, values in seen.items()},
        epochs={task: [epochs for _, epochs in values] for task, values in seen.items()},
    )


def _loss(measured: HeldOutRow | None) -> float:
    return math.nan if measured is None else measured.loss


def _training_means(run: RunRecord, steps: Sequence[int], tasks: Sequence[str]) -> ByTask:
    """Return the mean training loss of every task between each validation and the previous one."""
    means: dict[str, list[float]] = {task: [math.nan] for task in tasks}
    rows = iter(run.training)
    row = next(rows, None)
    for _, end in pairwise(steps):
        losses: dict[str, list[float]] = {task: [] for task in tasks}
        while row is not None and row.step <= end:
            for task, loss in row.loss_by_task.items():
                losses[task].append(loss)
            row = next(rows, None)
        for task, values in losses.items():
            finite = [value for value in values if math.isfinite(value)]
            means[task].append(fmean(finite) if finite else math.nan)
    return means


def _seen(run: RunRecord, task: str, step: int) -> tuple[float, float]:
    """Return this run's tokens, and the epochs over it and earlier runs, after `step` steps."""
    begin, tokens, epochs = run.origin.step, 0.0, 0.0
    for phase in run.plan.phases:
        share = phase.tasks.get(task)
        part = min(max(step - begin, 0) / max(phase.steps, 1), 1.0)
        begin += phase.steps
        if share is None:
            continue
        # At every step the task has had its rate within one sample, as the plan guarantees.
        tokens += part * share.tokens
        epochs = max(epochs, share.epochs_so_far - (1 - part) * share.epochs)
    return tokens, epochs


def _joined(source: RunCurves, run: RunCurves) -> RunCurves:
    """Return the source's curve up to the switch, followed by the run's own."""
    switch = run.switch or 0
    kept = [i for i, step in enumerate(source.steps) if step < switch]

    def join(before: ByTask, after: ByTask) -> ByTask:
        return {task: [*(before[task][i] for i in kept), *after[task]] for task in after}

    before = {task: source.tokens[task][-1] for task in source.tokens}
    training = {task: list(values) for task, values in run.training.items()}
    for task, values in source.training.items():
        training[task][0] = values[-1]  # the loss before the switch
    return RunCurves(
        steps=[*(source.steps[i] for i in kept), *run.steps],
        switch=switch,
        validation=join(source.validation, run.validation),
        training=join(source.training, training),
        tokens=join(
            source.tokens,
            {task: [before[task] + n for n in values] for task, values in run.tokens.items()},
        ),
        epochs=join(source.epochs, run.epochs),
    )


Values = Callable[[RunCurves], ByTask]


def mean_curve(
    curves: Mapping[str, RunCurves], point: Point, tasks: Sequence[str], values: Values
) -> Curve:
    """Return the mean over a setting's seeds and over tasks, at the steps that all seeds have."""
    runs = [curves[trial.name] for trial, _ in point.runs]
    steps = sorted(set.intersection(*(set(run.steps) for run in runs)))
    means = [
        fmean(values(run)[task][run.at(step)] for run in runs for task in tasks) for step in steps
    ]
    return np.array(steps, dtype=np.int64), np.array(means, dtype=np.float64)
