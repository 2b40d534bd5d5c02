"""What to leave out of a sweep, so that it fits a budget of time.

First the worse half of the settings is stopped early (`prune: halving`). If that is not enough,
values are left out, in rounds: in every round each arm halves the longest of its axes (peaks, where
several are as long, last), keeping values that spread over it. Every arm gives in every round, and
no arm is left out: none is compared with a rival that had more of its settings taken away. Seeds
are left out last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megaphase.sweep.arms.setting import TriedSetting, Value
from megaphase.sweep.planning.pruning import half
from megaphase.sweep.planning.work import Work, work_of
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial, expected_trials
from megaphase.utils.errors import InputError

Axes = Mapping[str, Sequence[Value]]
"""Values that are kept, by axis, in the order of the file."""


@dataclass(frozen=True)
class Omission:
    """A part of a sweep. title: what is done; sentences: what is left out of the file."""

    title: str
    sentences: Sequence[str]
    work: Work


def fit_budget(sweep: Sweep, trials: Sequence[Trial]) -> Iterator[Omission]:
    """Yield smaller and smaller parts of a sweep, down to one setting an arm and one seed."""
    halved = sweep
    if sweep.config.halving is None:
        config = sweep.config.model_copy(update={"prune": "halving"})
        halved = sweep.model_copy(update={"config": config})
        try:
            yield Omission("prune: halving", ["Add to the file: prune: halving"], work_of(halved))
        except InputError as error:  # there are too few validations
            halved = sweep
            reason = f"prune: halving is not counted: {error.problem}"
        else:
            reason = "Add to the file: prune: halving"
    else:
        reason = "prune: halving is in the file"
    finals = [trial for trial in trials if trial.is_final]
    arms: dict[str, Axes] = {
        arm: _axes(finals, arm) for arm in dict.fromkeys(trial.arm for trial in finals)
    }
    seeds = list(sweep.config.seeds)
    while True:
        if any(_longest(axes) for axes in arms.values()):
            arms = {arm: _shorter(axes) for arm, axes in arms.items()}
        elif len(seeds) > 1:
            seeds = seeds[: half(len(seeds))]
        else:
            return
        kept = [t for t in finals if t.seed in seeds and _is_kept(t.setting, arms[t.arm])]
        lines = [reason, *_left_out(finals, arms)]
        if len(seeds) < len(sweep.config.seeds):
            lines.append(f"seeds: leave out {_list(sweep.config.seeds[len(seeds) :])}")
        settings = {trial.setting for trial in kept}
        title = f"{len(settings)} of {len({t.setting for t in finals})} settings"
        if len(seeds) < len(sweep.config.seeds):
            title += f" and {len(seeds)} of {len(sweep.config.seeds)} seeds"
        if halved is not sweep:
            title += " with prune: halving"
        yield Omission(title, lines, work_of(halved, _with_first_parts(sweep, kept)))


def _axes(finals: Sequence[Trial], arm: str) -> dict[str, list[Value]]:
    """Return all values of an arm's axes."""
    found: dict[str, list[Value]] = {}
    for trial in finals:
        if trial.arm == arm:
            for axis, value in trial.setting.values:
                values = found.setdefault(axis, [])
                if value not in values:
                    values.append(value)
    return found


def _longest(axes: Axes) -> str | None:
    """Return the axis with most values, of several the first that is no peak; None if all have
    one value."""
    longest = max(axes, key=lambda axis: (len(axes[axis]), "peak" not in axis), default=None)
    return longest if longest is not None and len(axes[longest]) > 1 else None


def _shorter(axes: Axes) -> Axes:
    axis = _longest(axes)
    return axes if axis is None else {**axes, axis: spread(axes[axis])}


def spread(values: Sequence[Value]) -> list[Value]:
    """Return half of the values, rounded up, spread over all; of two, the first."""
    numbers = [value for value in values if isinstance(value, int | float)]
    ordered = sorted(numbers) if len(numbers) == len(values) else list(values)
    count = half(len(ordered))
    if count == 1:
        return [ordered[0]]
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def _is_kept(setting: TriedSetting, axes: Axes) -> bool:
    return all(value in axes[axis] for axis, value in setting.values)


def _left_out(finals: Sequence[Trial], arms: Mapping[str, Axes]) -> Iterator[str]:
    for arm, axes in arms.items():
        settings = dict.fromkeys(trial.setting for trial in finals if trial.arm == arm)
        lost = [each for each in settings if not _is_kept(each, axes)]
        if lost:
            names = _list(f"{each.label} at peak {each.peak:g}" for each in lost)
            yield f"{arm}: leave out {len(lost)} of {len(settings)} settings: {names}"


def _list(values: Sequence[object] | Iterator[object]) -> str:
    return ", ".join(str(value) for value in values)


def _with_first_parts(sweep: Sweep, kept: Sequence[Trial]) -> set[str]:
    """Return the names of these runs and of the first parts that they need: those from which they
    start, and of those among which these are chosen, the ones with a peak that is still tried."""
    choices: list[Sequence[Trial]] = []
    everything = {trial.name: trial for trial in expected_trials(sweep, {}, choices.append)}
    rivals: dict[str, list[Trial]] = {}
    for choice in choices:
        for trial in choice:
            rivals.setdefault(trial.name, []).extend(choice)
    peaks, seeds = {trial.peak for trial in kept}, {trial.seed for trial in kept}
    names: set[str] = set()
    waiting = list(kept)
    while waiting:
        trial = waiting.pop()
        if trial.name in names:
            continue
        names.add(trial.name)
        if trial.source is not None:
            source = everything[trial.source]
            own = [each for each in rivals.get(source.name, []) if each.peak in peaks]
            waiting += [each for each in [source, *own] if each.seed in seeds]
    return names
