"""The points of a sweep: one per setting of an arm, averaged over the seeds.

Losses are in nats per token; the high and the low loss are the means over the tasks of a group.
Settings are chosen by their losses on the validation split, and shown with those on the test split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple, Self

from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.pareto.measures import Pair, nondominated
from megaphase.sweep.pareto.statistics import Estimate, estimate
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial, blocked_trials

Split = Literal["test", "validation"]


@dataclass(frozen=True)
class RunLosses:
    """The losses of one run, all in nats per token or all in bits per byte.

    high, low: means over the tasks of a group.
    """

    tasks: Mapping[str, float]
    high: float
    low: float

    @classmethod
    def of(cls, tasks: Mapping[str, float], sweep: Sweep) -> Self:
        """Return the losses of both groups; infinite if one is not a number."""
        means = [fmean(tasks[task] for task in group) for group in (sweep.high, sweep.low)]
        high, low = (mean if math.isfinite(mean) else math.inf for mean in means)
        return cls(tasks, high, low)

    @property
    def mean(self) -> float:
        """The mean of both groups' losses."""
        return (self.high + self.low) / 2


@dataclass(frozen=True)
class Point:
    """The result of a setting.

    Attributes:
        runs: (run, outcome) by seed.
        losses, high, low: on the reported split.
        by_seed: the losses of each run on the reported split.
        bits_by_seed: likewise in bits per byte; None if they are not known for all.
        validation_by_seed: the losses of each run on the validation split.
        chosen_by: their means over the seeds.
    """

    setting: TriedSetting
    runs: Sequence[tuple[Trial, Outcome]]
    losses: dict[str, Estimate]
    high: Estimate
    low: Estimate
    by_seed: Mapping[int, RunLosses]
    bits_by_seed: Mapping[int, RunLosses] | None
    validation_by_seed: Mapping[int, RunLosses]
    chosen_by: RunLosses

    @property
    def pair(self) -> Pair:
        """(high loss, low loss) on the reported split."""
        return self.high.mean, self.low.mean


class Failure(NamedTuple):
    """A run without results, and the reason."""

    name: str
    reason: str


def reported_split(record: SweepRecord) -> Split:
    """Return the split whose losses are shown: test if all runs to compare were measured on it."""
    outcomes = [outcome for _, outcome in _compared_runs(record)]
    return "test" if outcomes and all(outcome.test for outcome in outcomes) else "validation"


def points_of(record: SweepRecord) -> list[Point]:
    """Return a point for every setting of which a run has ended, in the sweep's order.

    A setting with a failed or diverged run has no point, since the mean over the others would be
    too good; likewise if a run cannot start because one before it has failed or diverged, or was
    pruned. Seeds that have not ended yet are missing in the mean.
    """
    split = reported_split(record)
    blocked = {trial.setting for trial in blocked_trials(record.trials, record.outcomes)}
    runs: dict[TriedSetting, list[tuple[Trial, Outcome]]] = {}
    for trial, outcome in _ended_runs(record):
        runs.setdefault(trial.setting, []).append((trial, outcome))
    return [
        _point(record.sweep, setting, each, split)
        for setting, each in runs.items()
        if setting not in blocked and all(reason_of_failure(outcome) is None for _, outcome in each)
    ]


def _ended_runs(record: SweepRecord) -> Iterator[tuple[Trial, Outcome]]:
    for trial in record.trials:
        if trial.is_final and trial.name in record.outcomes:
            yield trial, record.outcomes[trial.name]


def _compared_runs(record: SweepRecord) -> Iterator[tuple[Trial, Outcome]]:
    return (each for each in _ended_runs(record) if reason_of_failure(each[1]) is None)


def _point(
    sweep: Sweep, setting: TriedSetting, runs: list[tuple[Trial, Outcome]], split: Split
) -> Point:
    tasks = (*sweep.high, *sweep.low)
    nats = {trial.seed: _losses(outcome, split) for trial, outcome in runs}
    bits = {trial.seed: _bits(outcome, split) for trial, outcome in runs}
    by_seed = {seed: RunLosses.of(losses, sweep) for seed, losses in nats.items()}
    has_bits = all(task in losses for losses in bits.values() for task in tasks)
    validation = {
        task: fmean(outcome.losses[task] for _, outcome in runs) for task in tasks
    }  # fmt: skip
    return Point(
        setting=setting,
        runs=runs,
        losses={task: estimate([losses[task] for losses in nats.values()]) for task in tasks},
        high=estimate([losses.high for losses in by_seed.values()]),
        low=estimate([losses.low for losses in by_seed.values()]),
        by_seed=by_seed,
        bits_by_seed=(
            {seed: RunLosses.of(losses, sweep) for seed, losses in bits.items()}
            if has_bits
            else None
        ),
        validation_by_seed={
            trial.seed: RunLosses.of(outcome.losses, sweep) for trial, outcome in runs
        },
        chosen_by=RunLosses.of(validation, sweep),
    )


def _losses(outcome: Outcome, split: Split) -> Mapping[str, float]:
    return outcome.test if split == "test" else outcome.losses


def _bits(outcome: Outcome, split: Split) -> Mapping[str, float]:
    return outcome.test_bits_per_byte if split == "test" else outcome.bits_per_byte


def reason_of_failure(outcome: Outcome) -> str | None:
    """Return why an ended run has no results to compare; None if it has."""
    if outcome.failed is not None:
        return outcome.failed
    if outcome.diverged is not None:
        return f"diverged: {outcome.diverged}"
    if outcome.pruned is not None:
        return f"pruned {outcome.pruned}"
    for losses, what in ((outcome.losses, "loss"), (outcome.test, "test loss")):
        if wrong := [task for task, loss in losses.items() if not math.isfinite(loss)]:
            return f"diverged: the {what} of {', '.join(wrong)} is not finite"
    return None


def failures(record: SweepRecord) -> list[Failure]:
    """Return the runs that ended without results, including first stages; without pruned ones."""
    found = (
        (trial.name, reason_of_failure(record.outcomes[trial.name]))
        for trial in record.trials
        if trial.name in record.outcomes and record.outcomes[trial.name].pruned is None
    )
    return [Failure(name, reason) for name, reason in found if reason is not None]


def front_of(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one dominates on the validation split, ascending in its high
    loss.
    """
    pairs = [(point.chosen_by.high, point.chosen_by.low) for point in points]
    return [points[i] for i in nondominated(pairs)]


def best_of(points: Iterable[Point]) -> Point | None:
    """Return the point with the lowest mean loss of both groups on the validation split."""
    return min(points, key=lambda point: point.chosen_by.mean, default=None)


def best_by_mixture(points: Iterable[Point]) -> list[Point]:
    """Return, of all settings that differ only in the last peak, the one with the lowest mean loss
    of both groups."""
    groups: dict[object, list[Point]] = {}
    for point in points:
        groups.setdefault(point.setting.without_last_peak, []).append(point)
    found = (best_of(each) for each in groups.values())
    return [point for point in found if point is not None]
