"""The work of a sweep: its runs in the parts in which they are trained, and how long they take."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megaphase.config.run import RunConfig
from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.planning.pruning import ComparedSettings, compared_settings, half
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial, expected_trials

HOUR = 3600.0
# Sections of a run file, and keys of a phase, on which the time of a step depends.
_SECTIONS = ("model", "batch", "parallel", "precision", "parts", "optimizer", "validation", "tasks")
_PHASE_KEYS = ("model", "batch", "cut", "average")
# Of those sections, keys that do not matter.
_IRRELEVANT = ("dropout", "weight_decay", "subsample")


class Part(NamedTuple):
    """Consecutive steps of a run that are trained by one command.

    before: numbers of the parts that must have ended. last_step: of the part, counted over the run.
    """

    trial: Trial
    first_step: int
    last_step: int
    before: frozenset[int]

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step

    @property
    def is_start(self) -> bool:
        """Whether the run begins with it."""
        return self.first_step == self.trial.first_step

    @property
    def is_end(self) -> bool:
        """Whether the run ends with it."""
        return self.last_step == self.trial.first_step + self.trial.steps

    @property
    def validations(self) -> int:
        """The validations in it: every so many steps, and at both ends of the run."""
        every = self.trial.validation_every
        count = self.last_step // every - self.first_step // every
        return count + self.is_start + (self.is_end and self.last_step % every != 0)


@dataclass(frozen=True)
class Costs:
    """Seconds of a run. start: of every command, without steps and validations. measuring: after a
    run that spends the budget, with what is then evaluated and translated."""

    step: float
    validation: float = 0.0
    start: float = 0.0
    measuring: float = 0.0

    def seconds(self, part: Part) -> float:
        """Return the time of a part."""
        found = self.start + part.steps * self.step + part.validations * self.validation
        return found + (self.measuring if part.is_end and part.trial.is_final else 0.0)


@dataclass(frozen=True)
class Work:
    """All parts of a sweep in the order of their start; with `prune`, as if the first settings of
    every comparison were the better ones."""

    parts: Sequence[Part]
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", sum(part.steps for part in self.parts))

    def seconds(self, costs: Callable[[Trial], Costs]) -> list[float]:
        """Return the time of each part."""
        return [costs(part.trial).seconds(part) for part in self.parts]

    def elapsed(self, seconds: Sequence[float], slots: int) -> float:
        """Return when all have ended, if `slots` are trained at a time and each one starts as soon
        as the ones before it have ended and a slot is free."""
        waiting = dict(enumerate(part.before for part in self.parts))
        ended: set[int] = set()
        running: list[tuple[float, int]] = []
        now = 0.0
        while waiting or running:
            for number in [n for n, before in waiting.items() if before <= ended]:
                if len(running) == slots:
                    break
                del waiting[number]
                heapq.heappush(running, (now + seconds[number], number))
            now, number = heapq.heappop(running)
            ended.add(number)
        return now

    def elapsed_in_rounds(self, seconds: Sequence[float], slots: int | None) -> float:
        """Return when all have ended if every round starts when the one before has ended.

        slots: runs at a time; None: all of a round.
        """
        total, ended = 0.0, set[int]()
        while len(ended) < len(self.parts):
            ready = [n for n, p in enumerate(self.parts) if n not in ended and p.before <= ended]
            alone = Work([self.parts[n]._replace(before=frozenset()) for n in ready])
            times = [seconds[n] for n in ready]
            total += alone.elapsed(times, slots or len(ready))
            ended |= set(ready)
        return total


def work_of(sweep: Sweep, kept: Collection[str] | None = None) -> Work:
    """Return the work of a sweep.

    kept: names of the runs that are not left out; None: all.

    Raises:
        InputError: with `prune`, a comparison would be before the first validation.
    """
    choices: list[Sequence[Trial]] = []
    trials = expected_trials(sweep, {}, choices.append)
    trials = [trial for trial in trials if kept is None or trial.name in kept]
    names = {trial.name for trial in trials}
    stops = _stops(sweep, names)
    candidates: dict[str, set[str]] = {}  # of a first stage, those among which it is chosen
    for choice in choices:
        for trial in choice:
            candidates.setdefault(trial.name, set()).update(each.name for each in choice)
    parts: list[Part] = []
    last_part: dict[str, int] = {}
    at_stop: dict[tuple[str, int], int] = {}
    for trial in trials:
        before: set[str] = set()
        if trial.source is not None:
            before = candidates.get(trial.source, {trial.source}) & names
        first = trial.first_step
        for stop in stops.get(trial.name, [trial.first_step + trial.steps]):
            needed = {last_part[name] for name in before if name in last_part}
            parts.append(Part(trial, first, stop, frozenset(needed)))
            at_stop[trial.name, stop] = last_part[trial.name] = len(parts) - 1
            first, before = stop, set()
    if sweep.config.halving is not None:
        parts = _after_comparisons(sweep, names, parts, at_stop)
    return Work(parts)


def _stops(sweep: Sweep, names: Collection[str]) -> dict[str, list[int]]:
    """Return the last steps of the parts of every run that is compared."""
    if sweep.config.halving is None:
        return {}
    stops: dict[str, list[int]] = {}
    for compared in compared_settings(sweep, {}):
        settings = _kept_settings(compared, names)
        left = len(settings)
        lasts: dict[TriedSetting, list[int]] = {setting: [] for setting in settings}
        for step in compared.steps:
            if left < 2:
                break
            for setting in list(settings)[:left]:
                lasts[setting].append(step)
            left = half(left)
        for place, (setting, trials) in enumerate(settings.items()):
            for trial in trials:
                end = [trial.first_step + trial.steps] if place < left else []
                stops[trial.name] = lasts[setting] + end
    return stops


def _kept_settings(
    compared: ComparedSettings, names: Collection[str]
) -> dict[TriedSetting, list[Trial]]:
    kept = {
        setting: [trial for trial in trials if trial.name in names]
        for setting, trials in compared.settings.items()
    }
    return {setting: trials for setting, trials in kept.items() if trials}


def _after_comparisons(
    sweep: Sweep,
    names: Collection[str],
    parts: Sequence[Part],
    at_stop: Mapping[tuple[str, int], int],
) -> list[Part]:
    """Return the parts, of which each after a comparison waits for all that are compared."""
    rivals: dict[str, list[str]] = {}
    for compared in compared_settings(sweep, {}):
        group = [trial.name for trial in compared.trials if trial.name in names]
        rivals |= dict.fromkeys(group, group)
    found = []
    for part in parts:
        before = set(part.before)
        if not part.is_start:
            there = [(name, part.first_step) for name in rivals[part.trial.name]]
            before |= {at_stop[key] for key in there if key in at_stop}
        found.append(part._replace(before=frozenset(before)))
    return found


def shape_of(trial: Trial) -> str:
    """Return what determines the time of a run's steps; equal for runs that take equally long."""
    run = trial.run
    sections: dict[str, Any] = {key: run.get(key) for key in _SECTIONS}
    sections["tasks"] = list(run["tasks"])
    phase = {key: run["phases"][0].get(key) for key in _PHASE_KEYS}
    return json.dumps([_relevant(sections), phase], sort_keys=True, default=str)


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _relevant(each) for key, each in value.items() if key not in _IRRELEVANT}
    return value


def tokens_per_step(config: RunConfig) -> int:
    """Return the tokens of a step of a run with one phase, with its full batch."""
    own = config.phases[0].model
    seq_len = (None if own is None else own.seq_len) or config.model.seq_len
    return config.phase_batch(0).samples * seq_len
