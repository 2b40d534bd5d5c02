"""The runs of a sweep: what each one trains, and from which other run it starts.

The first stage of an arm is trained with every peak of the grid. All branches of the arm start from
the one with the lowest loss, averaged over the seeds, again with every peak. So the runs are
determined step by step as runs end: `known_trials` is a pure function of the outcomes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

from megaphase.sweep.arms.setting import (
    Mixture,
    TriedSetting,
    number_in_name,
    short_form_setting,
)
from megaphase.sweep.file import STAGED, Arm
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.sweep import Sweep, set_all
from megaphase.utils.decimals import as_written
from megaphase.utils.errors import InputError
from megaphase.utils.names import MOST_BYTES_OF_RUN

PRETRAIN, JOINT, STATIC, RESTART, LOW_ONLY = "pretrain", "joint", "static", "restart", "low-only"
RATE_DECIMALS = 6

Phase = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One run of `megaphase train`.

    Attributes:
        setting: what it trains, up to and including its own phase; runs of other seeds share it.
        run: the content of its run file.
        phases: of the run files of the whole recipe up to and including this run, first to last.
        source: the name of the run from which it starts.
        source_phase: the phase at whose end it starts.
        is_final: whether it completes the budget; the others are first stages.
        takes_best: whether its weights are those with the lowest mean low-resource loss.
    """

    name: str
    setting: TriedSetting
    seed: int
    run: Mapping[str, Any]
    phases: Sequence[Phase]
    source: str | None
    source_phase: str | None
    is_final: bool
    takes_best: bool = False

    @property
    def arm(self) -> str:
        """The name in the sweep file; "pretrain" for a first stage that several arms share."""
        return self.setting.arm

    @property
    def model(self) -> str | None:
        """A name of the sweep file's models; None if there is only one model."""
        return self.setting.model

    @property
    def share(self) -> float | None:
        """Of the budget before the last phase; None if there is only one phase."""
        return self.setting.share

    @property
    def mixture(self) -> Mixture:
        """Of the run's own phase."""
        return self.setting.mixture

    @property
    def peak(self) -> float:
        """Of the run's own phase."""
        return self.setting.peak


Choice = Callable[[Sequence[Trial]], float | None]
"""Chooses the peak of a first stage for its branches; None if it is not known (yet)."""


def known_trials(sweep: Sweep, outcomes: Mapping[str, Outcome]) -> list[Trial]:
    """Return all runs that are known to belong to the sweep, in the order of their start."""
    return _trials(sweep, lambda candidates: best_peak(sweep, candidates, outcomes))


def ready_trials(sweep: Sweep, outcomes: Mapping[str, Outcome]) -> list[Trial]:
    """Return the known runs that have not ended and do not wait for another one."""

    def is_there(source: str | None) -> bool:
        return source is None or (source in outcomes and outcomes[source].can_be_branched)

    known = known_trials(sweep, outcomes)
    return [trial for trial in known if trial.name not in outcomes and is_there(trial.source)]


def all_trials(sweep: Sweep) -> list[Trial]:
    """Return as many runs as there will be in the end, as if the first peak were always best."""
    return _trials(sweep, lambda candidates: candidates[0].peak)


def count_trials(sweep: Sweep) -> int:
    """Return the number of runs in the end if none fails."""
    return len(all_trials(sweep))


def best_peak(
    sweep: Sweep, candidates: Sequence[Trial], outcomes: Mapping[str, Outcome]
) -> float | None:
    """Return the peak with the lowest loss, averaged over the seeds, if none of its runs failed.

    The loss is the mean over the tasks that the candidates train on. None while some have not
    ended, and if all have failed or diverged.
    """
    if any(trial.name not in outcomes for trial in candidates):
        return None
    scores: dict[float, list[float]] = {}
    failed: set[float] = set()
    for trial in candidates:
        outcome = outcomes[trial.name]
        if not outcome.can_be_branched:
            failed.add(trial.peak)
            continue
        scores.setdefault(trial.peak, []).append(own_loss(sweep, trial, outcome))
    means = {peak: fmean(each) for peak, each in scores.items() if peak not in failed}
    return min(means, key=lambda peak: (means[peak], peak), default=None)


def own_loss(sweep: Sweep, trial: Trial, outcome: Outcome) -> float:
    """Return the loss by which runs of a stage are compared: the mean over its training tasks."""
    groups = [sweep.high] if trial.mixture == Mixture() else [sweep.high, sweep.low]
    return fmean(outcome.group_loss(group) for group in groups)


def _trials(sweep: Sweep, choose: Choice) -> list[Trial]:
    """Return each run once, first stages first.

    Raises:
        InputError: two different runs have the same name, or a name is too long.
    """
    found: dict[str, Trial] = {}
    for trial in _all_trials(sweep, choose):
        if found.setdefault(trial.name, trial).run != trial.run:
            raise InputError(
                sweep.where("arms"),
                f"two different runs would be called {trial.name}",
                "rename an arm or a model",
            )
        if len(trial.name.encode()) > MOST_BYTES_OF_RUN:
            raise InputError(
                sweep.where(f"arms.{trial.arm}"),
                f"a run would be called {trial.name}, which is too long for a file",
                "shorten the names of arm and model",
            )
    return sorted(found.values(), key=lambda trial: trial.is_final)


def _all_trials(sweep: Sweep, choose: Choice) -> Iterator[Trial]:
    for model in sweep.config.models or [None]:
        for name in sweep.config.arms:
            yield from _Expansion(sweep, name, model, choose).trials()


@dataclass(frozen=True)
class _Expansion:
    """The runs of one arm with one model."""

    sweep: Sweep
    name: str
    model: str | None
    choose: Choice

    @property
    def arm(self) -> Arm:
        return self.sweep.config.arms[self.name]

    @property
    def kind(self) -> str:
        return self.sweep.kind(self.name)

    def trials(self) -> Iterator[Trial]:
        if self.kind not in STAGED:
            for mixture, peak, seed in product(self.mixtures(), *self.grid()):
                phase = self.phase(STATIC, self.sweep.steps, mixture, peak)
                yield self.trial(self.name, None, mixture, peak, seed, phase, None)
            return
        for share in self.arm.pretrain:
            if self.kind == "keep":
                yield from self.kept(share)
            elif self.kind == "restart":
                for mixture in self.mixtures():
                    yield from self.branches(share, mixture, [mixture])
            else:
                yield from self.branches(share, Mixture(), self.mixtures())

    def grid(self) -> tuple[list[float], list[int]]:
        return self.sweep.config.learning_rate.peaks, self.sweep.config.seeds

    def mixtures(self) -> list[Mixture]:
        if self.kind == LOW_ONLY:
            return [Mixture(rate=1.0)]
        rates = [Mixture(rate=rate) for rate in self.arm.rates]
        return rates + [Mixture(temperature=each) for each in self.arm.temperatures]

    def branches(self, share: float, first: Mixture, mixtures: list[Mixture]) -> Iterator[Trial]:
        """Yield first stages with every peak, and the branches of the best of them."""
        steps = self.first_steps(share)
        name, phase_name = self.first_name(first), PRETRAIN if first == Mixture() else STATIC
        candidates = [
            self.trial(
                name, share, first, peak, seed, self.phase(phase_name, steps, first, peak), None
            )
            for peak, seed in product(*self.grid())
        ]
        yield from candidates
        chosen = self.choose(candidates)
        sources = {trial.seed: trial for trial in candidates if trial.peak == chosen}
        if not sources:
            return
        last = {"restart": RESTART, LOW_ONLY: LOW_ONLY}.get(self.kind, JOINT)
        for mixture, peak, seed in product(mixtures, *self.grid()):
            phase = self.phase(last, self.sweep.steps - steps, mixture, peak)
            source = sources[seed]
            yield self.trial(self.name, share, mixture, peak, seed, phase, source)

    def kept(self, share: float) -> Iterator[Trial]:
        """Yield runs with one schedule and optimizer state over both phases, so with one peak."""
        first, whole = self.first_steps(share), self.sweep.steps
        for peak, seed in product(*self.grid()):
            schedule = {"steps": whole}
            phase = self.phase(PRETRAIN, first, Mixture(), peak, whole, schedule)
            source = self.trial(
                f"{self.name}-{PRETRAIN}", share, Mixture(), peak, seed, phase, None
            )
            yield source
            for mixture in self.mixtures():
                schedule = {"steps": whole, "first_step": first}
                phase = self.phase(JOINT, whole - first, mixture, peak, whole, schedule)
                phase["optimizer_state"] = "keep"
                yield self.trial(self.name, share, mixture, peak, seed, phase, source)

    def first_steps(self, share: float) -> int:
        return min(max(1, round(as_written(share) * self.sweep.steps)), self.sweep.steps - 1)

    def first_name(self, mixture: Mixture) -> str:
        """Return a name that arms without their own settings share, as they share first stages."""
        if mixture == Mixture() and not self.arm.settings:
            return PRETRAIN
        return f"{self.name}-first"

    def phase(
        self,
        name: str,
        steps: int,
        mixture: Mixture,
        peak: float,
        schedule_steps: int | None = None,
        schedule: Mapping[str, int] | None = None,
    ) -> Phase:
        grid = self.sweep.config.learning_rate
        return {
            "name": name,
            "steps": steps,
            "mixture": mixture_section(self.sweep, mixture),
            "learning_rate": {
                "schedule": grid.schedule,
                "peak": peak,
                "final": float(f"{peak * grid.final:.6g}"),
                "warmup_steps": round(as_written(grid.warmup) * (schedule_steps or steps)),
                **(schedule or {}),
            },
        }

    def trial(
        self,
        arm: str,
        share: float | None,
        mixture: Mixture,
        peak: float,
        seed: int,
        phase: Phase,
        source: Trial | None,
    ) -> Trial:
        is_final = source is not None or self.kind not in STAGED
        model = [] if self.model is None else [self.model]
        shares = [] if share is None else [number_in_name(share)]
        # If another first stage becomes the best one later, its branches are different runs.
        first = "" if source is None or source.peak == peak else f"-f{number_in_name(source.peak)}"
        suffix = f"{mixture.suffix}{first}-p{number_in_name(peak)}-s{seed}"
        name = "-".join([*model, arm, *shares]) + suffix
        takes_best = is_final and self.arm.early_stopping is not None
        run = self.run(name, seed, phase, stops_early=takes_best)
        before = () if source is None else source.setting.peaks
        return Trial(
            name=name,
            setting=short_form_setting(arm, self.model, share, mixture, (*before, peak)),
            seed=seed,
            run=run,
            phases=[*(() if source is None else source.phases), *run["phases"]],
            source=None if source is None else source.name,
            source_phase=None if source is None else source.run["phases"][0]["name"],
            is_final=is_final,
            takes_best=takes_best,
        )

    def run(self, name: str, seed: int, phase: Phase, *, stops_early: bool) -> dict[str, Any]:
        """Return the content of the run file."""
        sweep, arm = self.sweep, self.arm
        run: dict[str, Any] = {"seed": seed, "output": str(sweep.output / "runs" / name)}
        run |= copy.deepcopy(sweep.base)
        if self.model is not None:
            run["model"] |= sweep.config.models[self.model]
        set_all(sweep.file, f"arms.{self.name}.settings", sweep.file, run, arm.settings)
        if stops_early:
            overfit = {"tasks": sweep.low, "patience": arm.early_stopping, "when": "all"}
            phase = phase | {"stop": {"overfit": overfit}}
            run["monitor"] = {"tasks": sweep.low}
        return run | {"phases": [phase]}


def mixture_section(sweep: Sweep, mixture: Mixture) -> dict[str, Any]:
    """Return the section `mixture` of a phase."""
    if mixture.temperature is not None:
        return {"temperature": mixture.temperature}
    rate = mixture.rate or 0.0
    within = sweep.config.within
    rates = _shares(sweep, sweep.high, within.high, 1 - rate)
    rates |= _shares(sweep, sweep.low, within.low, rate)
    for group, part in ((sweep.high, 1 - rate), (sweep.low, rate)):
        if part > 0 and (lost := next((task for task in group if rates[task] == 0), None)):
            raise InputError(
                sweep.where("arms"),
                f"with {mixture.label} for the low-resource tasks {lost} has a rate below "
                f"{10**-RATE_DECIMALS:g}",
                "choose another rate, or another temperature under within",
            )
    largest = max(rates, key=lambda task: rates[task])
    rest = sum(each for task, each in rates.items() if task != largest)
    rates[largest] = round(1 - rest, RATE_DECIMALS)
    return {"rates": {task: each for task, each in rates.items() if each > 0}}


def _shares(sweep: Sweep, tasks: list[str], temperature: float, rate: float) -> dict[str, float]:
    """Divide a group's rate among its tasks."""
    most = max(sweep.tokens[task] for task in tasks)
    weights = {task: (sweep.tokens[task] / most) ** (1 / temperature) for task in tasks}
    total = sum(weights.values())
    return {task: round(rate * each / total, RATE_DECIMALS) for task, each in weights.items()}
