"""The points of a sweep: one per setting of an arm, averaged over the seeds.

Losses are in nats per token; the high and the low loss are the means over the tasks of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.pareto.measures import Pair, nondominated
from megaphase.sweep.pareto.statistics import Estimate, estimate
from megaphase.sweep.trials import Trial


@dataclass(frozen=True)
class Point:
    """The result of a setting.

    Attributes:
        runs: (run, outcome) by seed.
        losses: by task.
        low_by_seed: the low loss of each run.
    """

    setting: TriedSetting
    runs: Sequence[tuple[Trial, Outcome]]
    losses: dict[str, Estimate]
    high: Estimate
    low: Estimate
    low_by_seed: Mapping[int, float]

    @property
    def pair(self) -> Pair:
        """(high loss, low loss)."""
        return self.high.mean, self.low.mean

    @property
    def mean_loss(self) -> float:
        """The mean of both groups' losses; an arm's best point is the lowest in it."""
        return (self.high.mean + self.low.mean) / 2


class Failure(NamedTuple):
    """A run without results, and the reason."""

    name: str
    reason: str


def points_of(record: SweepRecord) -> list[Point]:
    """Return a point for every setting of which a run has ended, in the sweep's order.

    A setting with a failed or diverged run has no point, since the mean over the others would be
    too good. Seeds that have not ended yet are missing in the mean.
    """
    runs: dict[TriedSetting, list[tuple[Trial, Outcome]]] = {}
    for trial in record.trials:
        if trial.is_final and trial.name in record.outcomes:
            runs.setdefault(trial.setting, []).append((trial, record.outcomes[trial.name]))
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
            task: estimate([outcome.losses[task] for outcome in outcomes])
            for task in (*sweep.high, *sweep.low)
        },
        high=estimate([outcome.group_loss(sweep.high) for outcome in outcomes]),
        low=estimate([*low_by_seed.values()]),
        low_by_seed=low_by_seed,
    )


def reason_of_failure(outcome: Outcome) -> str | None:
    """Return why an ended run has no results to compare; None if it has."""
    if outcome.failed is not None:
        return outcome.failed
    if outcome.diverged is not None:
        return f"diverged: {outcome.diverged}"
    wrong = [task for task, loss in outcome.losses.items() if not math.isfinite(loss)]
    return f"diverged: the loss of {', '.join(wrong)} is not finite" if wrong else None


def failures(record: SweepRecord) -> list[Failure]:
    """Return the runs that ended without results, including first stages."""
    found = (
        (trial.name, reason_of_failure(record.outcomes[trial.name]))
        for trial in record.trials
        if trial.name in record.outcomes
    )
    return [Failure(name, reason) for name, reason in found if reason is not None]


def front_of(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one dominates, ascending in the high loss."""
    return [points[i] for i in nondominated([point.pair for point in points])]


def best_of(points: Iterable[Point]) -> Point | None:
    """Return the point with the lowest mean loss of both groups."""
    return min(points, key=lambda point: point.mean_loss, default=None)
