"""Successive halving: which runs of a sweep are stopped, as a function of their losses.

Settings of an arm that differ in peaks, rates and the like are compared at fixed steps; the worse
half of them is stopped. A decision depends only on validation losses at these steps, so it does not
matter when and in which order the runs got there, or whether the sweep was killed and resumed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.planning.config import Criterion
from megaphase.sweep.planning.ranking import by_fronts, by_loss
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import (
    Trial,
    blocked_trials,
    certain_sources,
    expected_trials,
    known_trials,
    own_loss,
    ready_trials,
)
from megaphase.utils.decimals import as_written
from megaphase.utils.errors import InputError

Losses = Mapping[str, float]
Rungs = Mapping[str, Mapping[int, Losses]]
"""Validation losses by run, step and task: of the steps at which settings are compared."""


class PendingRun(NamedTuple):
    """What a run is to train next: up to a step at which it is compared, or None, its end."""

    trial: Trial
    end_after: int | None


@dataclass(frozen=True)
class ComparedSettings:
    """The settings that are compared with each other.

    settings: each with its runs, one a seed. steps: at which they are compared, counted over the
    whole run. is_final: whether their runs complete the budget; others are first stages. blocked:
    names of runs that can never start.
    """

    settings: Mapping[TriedSetting, Sequence[Trial]]
    steps: Sequence[int]
    is_final: bool
    blocked: Set[str]

    @property
    def trials(self) -> Iterator[Trial]:
        for trials in self.settings.values():
            yield from trials


@dataclass(frozen=True)
class Halved:
    """What has been decided about compared settings.

    stopped: settings, with the step after which they were stopped. waiting_at: the step of the next
    comparison; None if there is none.
    """

    stopped: Mapping[TriedSetting, int]
    waiting_at: int | None


@dataclass(frozen=True)
class SweepState:
    """What is known of a sweep.

    outcomes: of runs that have ended or were pruned. pending_runs: those that are ready to train.
    """

    trials: Sequence[Trial]
    outcomes: Mapping[str, Outcome]
    pending_runs: Sequence[PendingRun]


def half(settings: int) -> int:
    """Return how many of these settings are kept: half of them, rounded up."""
    return -(-settings // 2)


def sweep_state(sweep: Sweep, outcomes: Mapping[str, Outcome], rungs: Rungs) -> SweepState:
    """Return which runs are known, have ended or were pruned, and which are ready, and how far.

    outcomes: of runs that have ended by themselves.
    """
    found = with_pruned(sweep, outcomes, rungs)
    known = known_trials(sweep, found)
    ready = ready_trials(known, found)
    if sweep.config.halving is None:
        return SweepState(known, found, [PendingRun(trial, None) for trial in ready])
    waiting = {
        trial.name: waiting_at
        for compared in compared_settings(sweep, found)
        if (waiting_at := _halve(sweep, compared, found, rungs).waiting_at) is not None
        for trial in compared.trials
    }
    pending_runs = [
        PendingRun(trial, waiting.get(trial.name))
        for trial in ready
        if waiting.get(trial.name) not in rungs.get(trial.name, {})
    ]
    return SweepState(known, found, pending_runs)


def with_pruned(sweep: Sweep, outcomes: Mapping[str, Outcome], rungs: Rungs) -> dict[str, Outcome]:
    """Return the outcomes with those of the runs that were pruned."""
    found = dict(outcomes)
    if sweep.config.halving is None:
        return found
    while True:
        new = dict(_pruned(sweep, found, rungs))
        if not new:
            return found
        found |= new  # which may complete a choice among first stages


def _pruned(
    sweep: Sweep, outcomes: Mapping[str, Outcome], rungs: Rungs
) -> Iterator[tuple[str, Outcome]]:
    for compared in compared_settings(sweep, outcomes):
        stopped = _halve(sweep, compared, outcomes, rungs).stopped
        for setting, step in stopped.items():
            for trial in compared.settings[setting]:
                if trial.name not in outcomes:
                    losses = dict(rungs.get(trial.name, {}).get(step, {}))
                    end = trial.first_step + trial.steps
                    words = f"after step {step:,} of {end:,}"
                    yield trial.name, Outcome(pruned=words, step=step, losses=losses)


def compared_settings(sweep: Sweep, outcomes: Mapping[str, Outcome]) -> list[ComparedSettings]:
    """Return the settings that are compared with each other, also of runs that are not known yet.

    Final runs compete within arm, model, and steps of their last phase; first stages with those
    among which the best is chosen.

    Raises:
        InputError: a comparison would be before the first validation.
    """
    every_choice: list[Sequence[Trial]] = []
    expected = expected_trials(sweep, outcomes, every_choice.append)
    choices = {frozenset(trial.name for trial in found): found for found in every_choice}
    sources = certain_sources(sweep, outcomes)
    members = Counter(name for names in choices for name in names)
    groups: dict[object, list[Trial]] = {}
    for names, candidates in choices.items():
        # Another arm may need a stage that is not the best here. There are none after a first stage
        # that diverged with every peak.
        if names and not any(name in sources or members[name] > 1 for name in names):
            groups[names] = [*candidates]
    for trial in expected:
        if trial.is_final:
            key = trial.arm, trial.model, trial.first_step, trial.steps
            groups.setdefault(key, []).append(trial)
    blocked = {trial.name for trial in blocked_trials(expected, outcomes)}
    return [_compared(sweep, trials, blocked) for trials in groups.values()]


def _compared(sweep: Sweep, trials: Sequence[Trial], blocked: Set[str]) -> ComparedSettings:
    settings: dict[TriedSetting, list[Trial]] = {}
    for trial in trials:
        settings.setdefault(trial.setting, []).append(trial)
    steps = comparison_steps(sweep, trials) if len(settings) > 1 else []
    return ComparedSettings(settings, steps, trials[0].is_final, blocked)


def comparison_steps(sweep: Sweep, trials: Sequence[Trial]) -> list[int]:
    """Return the steps at which runs of the same steps are compared: the validations that all of
    them have at or before the fractions of their own steps, counted over the whole run.

    Raises:
        InputError: there is no such validation before one of them.
    """
    halving, trial = sweep.config.halving, trials[0]
    assert halving is not None
    intervals = sorted({each.validation_every for each in trials})
    every = math.lcm(*intervals)
    which = "its first validation"
    if len(intervals) > 1:
        which = "the first validation of all runs that are compared"
    told = " and ".join(f"{each:,}" for each in intervals)
    found: list[int] = []
    for fraction in halving.at:
        step = trial.first_step + int(as_written(fraction) * trial.steps)
        step -= step % every
        if step <= trial.first_step:
            raise InputError(
                sweep.where("prune.at"),
                f"{fraction:g} of the {trial.steps:,} steps of {trial.name} is before {which}, "
                f"and validation.every_steps is {told}",
                "lower validation.every_steps, or raise the fraction",
            )
        if step not in found:
            found.append(step)
    return found


def _halve(
    sweep: Sweep, compared: ComparedSettings, outcomes: Mapping[str, Outcome], rungs: Rungs
) -> Halved:
    halving = sweep.config.halving
    assert halving is not None
    stopped: dict[TriedSetting, int] = {}
    left = list(compared.settings)
    for step in compared.steps:
        if len(left) < 2:
            break
        losses = [_losses_at(compared, setting, step, outcomes, rungs) for setting in left]
        if any(each is None for each in losses):
            return Halved(stopped, step)
        measured = [each for each in losses if each is not None]
        trials = [compared.settings[setting] for setting in left]
        order = (
            _final_order(sweep, halving.by, measured)
            if compared.is_final
            else by_loss(_own_losses(sweep, trials, measured))
        )
        kept = set(order[: half(len(left))])
        stopped |= {each: step for number, each in enumerate(left) if number not in kept}
        left = [each for number, each in enumerate(left) if number in kept]
    return Halved(stopped, None)


def _losses_at(
    compared: ComparedSettings,
    setting: TriedSetting,
    step: int,
    outcomes: Mapping[str, Outcome],
    rungs: Rungs,
) -> list[Outcome] | None:
    """Return what a setting's runs have measured at a step; None if one is not there yet."""
    found: list[Outcome] = []
    for trial in compared.settings[setting]:
        losses, outcome = rungs.get(trial.name, {}).get(step), outcomes.get(trial.name)
        if losses is not None:
            found.append(Outcome(step=step, losses=dict(losses)))
        elif outcome is not None:  # it ended before this step
            found.append(outcome)
        elif trial.name in compared.blocked:
            found.append(Outcome(failed="the run from which it starts has no end"))
        else:
            return None
    return found


def _final_order(sweep: Sweep, by: Criterion, measured: Sequence[Sequence[Outcome]]) -> list[int]:
    pairs = [(_mean(sweep.high, each), _mean(sweep.low, each)) for each in measured]
    if by == "fronts":
        return by_fronts(pairs)
    if by == "mean":
        return by_loss([fmean(pair) for pair in pairs])
    return by_loss([high if by == "high" else low for high, low in pairs])


def _mean(group: Sequence[str], outcomes: Sequence[Outcome]) -> float:
    """Return the mean loss over the seeds; infinite if one has none."""
    if not all(outcome.can_be_branched for outcome in outcomes):
        return math.inf
    return fmean(outcome.group_loss(group) for outcome in outcomes)


def _own_losses(
    sweep: Sweep, trials: Sequence[Sequence[Trial]], measured: Sequence[Sequence[Outcome]]
) -> list[float]:
    return [
        fmean(own_loss(sweep, trial, outcome) for trial, outcome in zip(own, each, strict=True))
        if all(outcome.can_be_branched for outcome in each)
        else math.inf
        for own, each in zip(trials, measured, strict=True)
    ]
