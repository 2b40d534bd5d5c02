"""The peaks chosen for the first stages of a sweep, and the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.pareto.points import (
    reason_of_failure,
)
from megaphase.sweep.pareto.statistics import Estimate, estimate
from megaphase.sweep.trials import Trial, own_loss


@dataclass(frozen=True)
class FirstStage:
    """A first stage that was trained with every peak.

    Attributes:
        setting: with the lowest peak.
        losses: mean over the trained groups, by peak; None if a run failed or has not ended.
        taken: the peaks from which branches start.
    """

    setting: TriedSetting
    losses: Mapping[float, Estimate | None]
    taken: frozenset[float]

    @property
    def reason(self) -> str:
        """The reason for these peaks."""
        if not self.taken:
            return "not chosen yet"
        if len(self.taken) > 1 or len(self.losses) == 1:
            return "the only one" if len(self.losses) == 1 else "each continues with its own peak"
        return "the lowest loss"


def first_stages(record: SweepRecord) -> list[FirstStage]:
    """Return the first stages in the sweep's order."""
    used = {trial.source for trial in record.trials}
    groups: dict[object, list[Trial]] = {}
    for trial in record.trials:
        if not trial.is_final:
            groups.setdefault(trial.setting.without_last_peak, []).append(trial)
    return [
        FirstStage(
            setting=trials[0].setting,
            losses={
                peak: _loss(record, [trial for trial in trials if trial.peak == peak])
                for peak in dict.fromkeys(trial.peak for trial in trials)
            },
            taken=frozenset(trial.peak for trial in trials if trial.name in used),
        )
        for trials in groups.values()
    ]


def _loss(record: SweepRecord, trials: list[Trial]) -> Estimate | None:
    outcomes = [record.outcomes.get(trial.name) for trial in trials]
    losses = [
        own_loss(record.sweep, trial, outcome)
        for trial, outcome in zip(trials, outcomes, strict=True)
        if outcome is not None and reason_of_failure(outcome) is None
    ]
    return estimate(losses) if len(losses) == len(trials) else None
