"""The points of a sweep: one per setting of an arm, the mean over the seeds.

Losses are in nats per token; the high and the low loss are the means over the tasks of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.pareto.measures import Pair, nondominated
from megaphase.sweep.trials import Mixture, Trial


class SeedMean(NamedTuple):
    """A mean over seeds and its standard error, None where there is one seed alone."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class TriedSetting:
    """All that an arm has tried at once; runs that differ in nothing but the seed share it."""

    arm: str
    model: str | None
    share: float | None
    mixture: Mixture
    peak: float

    @property
    def label(self) -> str:
        """The mixture, and after what share of the budget it begins."""
        after = "" if self.share is None else f" after {100 * self.share:g}%"
        return f"{self.mixture.label}{after}"


@dataclass(frozen=True)
class Point:
    """What a setting came to.

    Attributes:
        runs: (run, outcome) by seed.
        losses: by task.
        low_by_seed: the low loss of each run.
    """

    setting: TriedSetting
    runs: Sequence[tuple[Trial, Outcome]]
    losses: dict[str, SeedMean]
    high: SeedMean
    low: SeedMean
    low_by_seed: Mapping[int, float]

    @property
    def pair(self) -> Pair:
        """High loss, low loss."""
        return self.high.mean, self.low.mean

    @property
    def mean_loss(self) -> float:
        """Of both groups; what is lowest in it is called an arm's best."""
        return (self.high.mean + self.low.mean) / 2


class Failure(NamedTuple):
    """A run without figures, and why."""

    name: str
    reason: str


def setting_of(trial: Trial) -> TriedSetting:
    """A run without its seed."""
    return TriedSetting(trial.arm, trial.model, trial.share, trial.mixture, trial.peak)


def mean_over_seeds(values: Sequence[float]) -> SeedMean:
    """The mean, and the standard error of it."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return SeedMean(fmean(values), error)


def points_of(record: SweepRecord) -> list[Point]:
    """A point for every setting of which a run has ended, in the sweep's order.

    A setting of which one run failed or diverged has none: the mean over the others would flatter
    it. Seeds that have not ended yet are missing in the mean.
    """
    runs: dict[TriedSetting, list[tuple[Trial, Outcome]]] = {}
    for trial in record.trials:
        if trial.is_final and trial.name in record.outcomes:
            runs.setdefault(setting_of(trial), []).append((trial, record.outcomes[trial.name]))
    return [
        _point(record, setting, each)
        for setting, each in runs.items()
        if all(reason_of_failure(outcome) is None for _, outcome in each)
    ]


def _point(record: SweepRecord, setting: TriedSetting, runs: list[tuple[Trial, Outcome]]) -> Point:
    sweep, outcomes = record.sweep, [outcome for _, outcome in runs]
    low_by_seed = {trial.seed: outcome.group_loss(sweep.low) for trial, outcome in runs}
    return Point(
        setting=setting,
        runs=runs,
        losses={
            task: mean_over_seeds([outcome.losses[task] for outcome in outcomes])
            for task in (*sweep.high, *sweep.low)
        },
        high=mean_over_seeds([outcome.group_loss(sweep.high) for outcome in outcomes]),
        low=mean_over_seeds([*low_by_seed.values()]),
        low_by_seed=low_by_seed,
    )


def reason_of_failure(outcome: Outcome) -> str | None:
    """Why an ended run has no figures to compare; None where it has."""
    if outcome.failed is not None:
        return outcome.failed
    if outcome.diverged is not None:
        return f"diverged: {outcome.diverged}"
    wrong = [task for task, loss in outcome.losses.items() if not math.isfinite(loss)]
    return f"diverged: the loss of {', '.join(wrong)} is not finite" if wrong else None


def failures(record: SweepRecord) -> list[Failure]:
    """The runs that ended without figures, first stages among them."""
    found = (
        (trial.name, reason_of_failure(record.outcomes[trial.name]))
        for trial in record.trials
        if trial.name in record.outcomes
    )
    return [Failure(name, reason) for name, reason in found if reason is not None]


def front_of(points: Sequence[Point]) -> list[Point]:
    """The points that no other one dominates, ascending in the high loss."""
    return [points[i] for i in nondominated([point.pair for point in points])]


def best_of(points: Iterable[Point]) -> Point | None:
    """The point whose mean loss of both groups is lowest."""
    return min(points, key=lambda point: point.mean_loss, default=None)
