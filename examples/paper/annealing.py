"""Annealing x order: the choice and the contrasts laid down in docs/planned-comparisons.md.

    python annealing.py premise FOLDER/runs/annealing-screen
    python annealing.py choose FOLDER/runs/annealing-screen
    python annealing.py contrast FOLDER/runs/annealing-screen FOLDER/runs/annealing-confirm-*

`premise` says whether static mixtures overfit, `choose` prints `primary` and `arms` of
confirm-1.yaml to confirm-3.yaml, `contrast` a table.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.special import stdtrit

from megaphase.sweep.directory import SweepRecord, load_sweep_record
from megaphase.sweep.pareto.curves import mean_curve, read_runs
from megaphase.sweep.pareto.points import points_of
from megaphase.sweep.pareto.statistics import Estimate, holm
from megaphase.sweep.trials import all_trials, chain_of, ready_trials
from megaphase.utils.errors import InputError

ARMS = ("static", "restart", "keep", "two-phase")
PRIMARY = ("two-phase", "restart")
SECONDARY = (
    ("keep", "static"),
    ("restart", "static"),
    ("two-phase", "static"),
    ("two-phase", "keep"),
)
# The seeds of the three confirmations, each with documents of its own.
SEEDS = (range(11, 15), range(15, 18), range(18, 21))
# Of the intervals: two data sets are judged, each at half of 5 %.
CONFIDENCE = 0.975
# The second setting of an arm may cost at most this much of the high-resource loss, in nats.
ALLOWED = 0.05
# Static mixtures overfit if the low-resource loss ends at least this much above its lowest.
RISEN = 0.05

Recipe = tuple[tuple[int, float, str, float, bool], ...]
"""Of each phase: steps, rate of the low-resource tasks, schedule, peak, whether it continues the
schedule of the phase before."""


@dataclass(frozen=True)
class Run:
    """A run that was to spend the budget.

    Losses by task, in nats per token; empty if it diverged, also in its first stage, or was not
    started because the first stage of another seed did.
    """

    arm: str
    recipe: Recipe
    seed: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    test_bits_per_byte: Mapping[str, float]
    diverged: bool = False


@dataclass(frozen=True)
class Groups:
    """The high- and the low-resource tasks."""

    high: Sequence[str]
    low: Sequence[str]

    def high_loss(self, losses: Mapping[str, float]) -> float:
        return fmean(losses[task] for task in self.high)

    def low_loss(self, losses: Mapping[str, float]) -> float:
        return fmean(losses[task] for task in self.low)

    def measure(self, losses: Mapping[str, float]) -> float:
        """Return S, the mean of both."""
        return (self.high_loss(losses) + self.low_loss(losses)) / 2


def runs_of(record: SweepRecord) -> list[Run]:
    """Return the runs of a sweep that have spent the budget, or diverged before.

    Raises:
        InputError: one has failed or not ended.
    """
    outcomes, low, found = record.outcomes, record.sweep.low, []
    missing = [trial.name for trial in ready_trials(record.trials, outcomes)]
    missing += [name for name, outcome in outcomes.items() if outcome.failed is not None]
    if missing:
        raise InputError(missing[0], "has failed or not ended", "give the sweep command again")
    # Not all of them are in the record: none starts from a first stage that diverged.
    trials = {trial.name: trial for trial in all_trials(record.sweep)}
    for trial in trials.values():
        if not trial.is_final:
            continue
        ended = [outcomes[each.name] for each in chain_of(trial, trials) if each.name in outcomes]
        diverged = any(each.diverged is not None for each in ended)
        outcome = None if diverged else outcomes.get(trial.name)
        losses = (
            ({}, {}, {})
            if outcome is None
            else (outcome.losses, outcome.test, outcome.test_bits_per_byte)
        )
        arm = next(name for name in ARMS if trial.arm.startswith(name))
        recipe = tuple(_phase(phase, low) for phase in trial.phases)
        found.append(Run(arm, recipe, trial.seed, *losses, diverged=diverged))
    return found


def _phase(phase: Mapping[str, Any], low: Sequence[str]) -> tuple[int, float, str, float, bool]:
    rate = phase["learning_rate"]
    low_rate = round(sum(phase["mixture"]["rates"].get(task, 0.0) for task in low), 4)
    return phase["steps"], low_rate, rate["schedule"], rate["peak"], "first_step" in rate


def premise(record: SweepRecord) -> list[str]:
    """Return how far static mixtures at the highest rate overfit, by peak, and whether that counts.

    Raises:
        InputError: the directory of a run is damaged, or no static run has ended.
    """
    static = [point for point in points_of(record) if point.setting.arm == "static"]
    if not static:
        raise InputError("static", "has no ended run", "give the sweep command again")
    curves, low = read_runs(record).curves, record.sweep.low
    highest = max(point.setting.mixture.rate or 0.0 for point in static)
    lines, most = [], 0.0
    for point in static:
        if point.setting.mixture.rate == highest:
            _, losses = mean_curve(curves, point, low, lambda run: run.validation)
            risen = float(losses[-1] - losses.min())
            most = max(most, risen)
            where = f"static, {highest:.1%}, peak {point.setting.peak:g}"
            lines.append(f"{where}: ends {risen:.3f} nats above its lowest")
    return [*lines, f"premise: {'given' if most >= RISEN else 'not given'}"]


def choose(runs: Iterable[Run], groups: Groups) -> dict[str, list[Recipe]]:
    """Return the two settings of each arm that are confirmed, by the rule of the docs.

    Raises:
        InputError: an arm has fewer than two settings without divergence.
    """
    by_setting: dict[tuple[str, Recipe], list[Run]] = defaultdict(list)
    for run in runs:
        by_setting[run.arm, run.recipe].append(run)
    chosen = {}
    for arm in ARMS:
        settings = [
            (recipe, [run.validation for run in own])
            for (name, recipe), own in by_setting.items()
            if name == arm and all(run.validation for run in own)
        ]
        if len(settings) < 2:
            raise InputError(arm, "has fewer than two settings without divergence")

        def mean(
            setting: tuple[Recipe, list[Mapping[str, float]]], of: Callable[..., float]
        ) -> float:
            return fmean(of(losses) for losses in setting[1])

        first, *others = sorted(settings, key=lambda each: mean(each, groups.measure))
        limit = mean(first, groups.high_loss) + ALLOWED
        allowed = [each for each in others if mean(each, groups.high_loss) <= limit]
        second = (
            min(allowed, key=lambda each: mean(each, groups.low_loss)) if allowed else others[0]
        )
        chosen[arm] = [first[0], second[0]]
    return chosen


def confirmed_sections(chosen: Mapping[str, Sequence[Recipe]]) -> str:
    """Return the sections `primary` and `arms` of a sweep file with these settings alone."""
    lines = [f"primary: {{arm: {PRIMARY[0]}-1, against: [{PRIMARY[1]}-1]}}", "arms:"]
    for arm, recipes in chosen.items():
        for number, recipe in enumerate(recipes, 1):
            total = sum(steps for steps, *_ in recipe)
            lines += [f"  {arm}-{number}:", "    phases:"]
            for index, (steps, low_rate, schedule, peak, continues) in enumerate(recipe):
                share = f"share: {steps / total:g}, " if index < len(recipe) - 1 else ""
                rate = "continue" if continues else f"{{schedule: {schedule}, peak: {peak:g}}}"
                lines.append(f"      - {{{share}rate: {low_rate:g}, learning_rate: {rate}}}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences over sets of documents, each set with the same weight.

    Sets are blocks: the error is that of the seeds within a set, pooled, so what is concluded
    holds for these sets of documents.
    """

    of_sets: Sequence[Sequence[float]]

    @property
    def means(self) -> list[float]:
        return [fmean(own) for own in self.of_sets]

    @property
    def mean(self) -> float:
        return fmean(self.means)

    @cached_property
    def _estimate(self) -> Estimate:
        squares = (
            (value - mean) ** 2
            for own, mean in zip(self.of_sets, self.means, strict=True)
            for value in own
        )
        freedom = sum(len(own) - 1 for own in self.of_sets)
        shares = sum(1 / len(own) for own in self.of_sets)
        error = sqrt(sum(squares) / freedom * shares) / len(self.of_sets)
        return Estimate(self.mean, error, freedom + 1)

    @property
    def half_width(self) -> float:
        """Half of the interval's width, by Student's t."""
        assert self._estimate.error is not None
        return float(stdtrit(self._estimate.n - 1, (1 + CONFIDENCE) / 2)) * self._estimate.error

    @property
    def p(self) -> float:
        """The two-sided probability of such a mean where the true one is 0."""
        assert self._estimate.p is not None
        return self._estimate.p

    @property
    def sign(self) -> int:
        """-1 or 1 if the whole interval is below or above 0, otherwise 0."""
        return 0 if abs(self.mean) <= self.half_width else -1 if self.mean < 0 else 1


@dataclass(frozen=True)
class Contrast:
    """One setting minus another one.

    diverged: how many runs of the one and of the other did. A setting of which one did has lost.
    """

    one: Sequence[Mapping[int, Run]]
    other: Sequence[Mapping[int, Run]]

    @property
    def diverged(self) -> tuple[int, int]:
        one, other = (
            sum(run.diverged for own in sets for run in own.values())
            for sets in (self.one, self.other)
        )
        return one, other

    def difference(self, of: Callable[[Run], float]) -> Difference:
        pairs = zip(self.one, self.other, strict=True)
        return Difference([[of(one[s]) - of(other[s]) for s in one] for one, other in pairs])


def table(
    chosen: Mapping[str, Sequence[Recipe]], sets: Sequence[Sequence[Run]], groups: Groups
) -> list[str]:
    """Return the lines of the result: the primary contrast, then all others, corrected by Holm.

    Raises:
        InputError: a run has no losses on a test split, or the seeds are not those of the plan.
    """
    if any(run.validation and not run.test for run in chain.from_iterable(sets)):
        raise InputError("test", "the sweep has no losses on a test split", "set test.fraction")

    def runs_with(recipe: Recipe) -> list[Mapping[int, Run]]:
        found: list[Mapping[int, Run]] = [
            {run.seed: run for run in own if run.recipe == recipe} for own in sets
        ]
        if (seeds := [sorted(own) for own in found]) != [list(own) for own in SEEDS]:
            raise InputError("seeds", f"the plan has {[*map(list, SEEDS)]}, a setting {seeds}")
        return found

    def contrast(names: tuple[str, str], number: int) -> Contrast:
        one, other = (runs_with(chosen[name][number]) for name in names)
        return Contrast(one, other)

    lines = [
        *_primary_lines(contrast(PRIMARY, 0), groups),
        "",
        f"Intervals: {100 * CONFIDENCE:g} %, not corrected. Holm: over all rows of this table.",
        "",
        "| settings | contrast | measure | difference | p | p after Holm | by set of documents |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows: list[tuple[str, Difference | str]] = []
    for number, names in product((0, 1), (PRIMARY, *SECONDARY)):
        label = f"| {('first', 'second')[number]} | {' - '.join(names)}"
        found = contrast(names, number)
        if any(found.diverged):
            rows.append((f"{label} | all", _lost(names, found)))
            continue
        rows += [
            (f"{label} | {measure}", found.difference(of))
            for measure, of in _measures(groups).items()
            if (number, names, measure) != (0, PRIMARY, "S")
        ]
    corrected = iter(holm([each.p for _, each in rows if isinstance(each, Difference)]))
    for label, each in rows:
        if isinstance(each, str):
            lines.append(f"{label} | {each} | | | |")
        else:
            value = f"{each.mean:+.4f} ± {each.half_width:.4f}"
            by_set = ", ".join(f"{mean:+.4f}" for mean in each.means)
            row = f"{label} | {value} | {each.p:.3g} | {next(corrected):.3g} | {by_set} |"
            lines.append(row)
    return lines


def _measures(groups: Groups) -> dict[str, Callable[[Run], float]]:
    """Return what is compared on the test split, in nats per token."""
    measures: dict[str, Callable[[Run], float]] = {
        "S": lambda run: groups.measure(run.test),
        "high": lambda run: groups.high_loss(run.test),
        "low": lambda run: groups.low_loss(run.test),
    }
    for task in (*groups.high, *groups.low):
        measures[task] = lambda run, task=task: run.test[task]
    return measures


def _primary_lines(found: Contrast, groups: Groups) -> list[str]:
    name = " - ".join(PRIMARY)
    if any(found.diverged):
        return [f"primary: {name}: {_lost(PRIMARY, found)}"]
    nats = found.difference(_measures(groups)["S"])
    in_bytes = found.difference(lambda run: groups.measure(run.test_bits_per_byte))
    verdict = {-1: "the order gains", 1: "the order loses", 0: "undecided"}[nats.sign]
    if nats.sign * in_bytes.sign < 0:
        verdict = "depends on the unit"
    if len({mean > 0 for mean in nats.means}) > 1:
        verdict += "; the sets of documents differ in sign"
    return [
        f"primary: {name}, S: {nats.mean:+.4f} ± {nats.half_width:.4f} (p = {nats.p:.3g}): "
        f"{verdict}",
        f"by set of documents: {', '.join(f'{mean:+.4f}' for mean in nats.means)}",
        f"bits per byte: {in_bytes.mean:+.4f} ± {in_bytes.half_width:.4f}",
    ]


def _lost(names: tuple[str, str], found: Contrast) -> str:
    total = sum(map(len, found.one))
    diverged = {name: count for name, count in zip(names, found.diverged, strict=True) if count > 0}
    lost = "undecided" if len(diverged) > 1 else f"{next(iter(diverged))} lost"
    counts = ", ".join(f"{name} {count} of {total}" for name, count in diverged.items())
    return f"{lost} (diverged: {counts})"


def main(command: str, screen: str, *confirm: str) -> None:
    record = load_sweep_record(Path(screen))
    if command == "premise":
        print("\n".join(premise(record)))
        return
    groups = Groups(record.sweep.high, record.sweep.low)
    chosen = choose(runs_of(record), groups)
    if command == "choose":
        print(confirmed_sections(chosen))
    else:
        sets = [runs_of(load_sweep_record(Path(folder))) for folder in confirm]
        print("\n".join(table(chosen, sets, groups)))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
