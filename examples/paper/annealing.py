"""Annealing x order: the choice and the contrasts laid down in docs/experiments.md.

    python annealing.py choose FOLDER/runs/annealing-screen
    python annealing.py contrast FOLDER/runs/annealing-screen FOLDER/runs/annealing-confirm-*

`choose` prints `primary` and `arms` of confirm-1.yaml to confirm-3.yaml, `contrast` a table. Both
follow "Planned comparisons" there.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from megaphase.sweep.directory import SweepRecord, load_sweep_record
from megaphase.sweep.pareto.statistics import estimate, holm
from megaphase.utils.errors import InputError

ARMS = ("static", "restart", "keep", "two-phase")
PRIMARY = ("two-phase", "restart")
SECONDARY = (
    ("keep", "static"),
    ("restart", "static"),
    ("two-phase", "static"),
    ("two-phase", "keep"),
)
# The second setting of an arm may cost at most this much of the high-resource loss, in nats.
ALLOWED = 0.05

Recipe = tuple[tuple[int, float, str, float, bool], ...]
"""Of each phase: steps, rate of the low-resource tasks, schedule, peak, whether it continues the
schedule of the phase before."""


@dataclass(frozen=True)
class Run:
    """A run that has spent the budget. Losses by task, in nats per token; empty if it diverged."""

    arm: str
    recipe: Recipe
    seed: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    test_bits_per_byte: Mapping[str, float]


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
    """Return the runs of a sweep that have spent the budget.

    Raises:
        InputError: one has failed or not ended.
    """
    low, found = record.sweep.low, []
    for trial in record.trials:
        if not trial.is_final:
            continue
        outcome = record.outcomes.get(trial.name)
        if outcome is None or outcome.failed is not None:
            raise InputError(trial.name, "has failed or not ended", "give the sweep command again")
        arm = next(name for name in ARMS if trial.arm.startswith(name))
        recipe = tuple(_phase(phase, low) for phase in trial.phases)
        diverged = outcome.diverged is not None
        losses = (
            ({}, {}, {}) if diverged else (outcome.losses, outcome.test, outcome.test_bits_per_byte)
        )
        found.append(Run(arm, recipe, trial.seed, *losses))
    return found


def _phase(phase: Mapping[str, Any], low: Sequence[str]) -> tuple[int, float, str, float, bool]:
    rate = phase["learning_rate"]
    low_rate = round(sum(phase["mixture"]["rates"].get(task, 0.0) for task in low), 4)
    return phase["steps"], low_rate, rate["schedule"], rate["peak"], "first_step" in rate


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


def differences(
    runs: Iterable[Run], one: Recipe, other: Recipe, of: Callable[[Run], float]
) -> dict[int, float]:
    """Return one setting's value minus the other's by seed, for the seeds of both."""
    values: dict[Recipe, dict[int, float]] = {one: {}, other: {}}
    for run in runs:
        if run.recipe in values:
            values[run.recipe][run.seed] = of(run)
    seeds = sorted(values[one].keys() & values[other].keys())
    return {seed: values[one][seed] - values[other][seed] for seed in seeds}


def table(
    chosen: Mapping[str, Sequence[Recipe]], sets: Sequence[Sequence[Run]], groups: Groups
) -> list[str]:
    """Return the lines of the result: the primary contrast, then all others, corrected by Holm.

    Raises:
        InputError: a run has no losses on a test split.
    """
    runs = list(chain.from_iterable(sets))
    if any(run.validation and not run.test for run in runs):
        raise InputError("test", "the sweep has no losses on a test split", "set test.fraction")
    if any(not run.validation for run in runs):
        raise InputError("runs", "a run has diverged, and its setting has lost: no mean is given")
    measures: dict[str, Callable[[Run], float]] = {
        "S": lambda run: groups.measure(run.test),
        "high": lambda run: groups.high_loss(run.test),
        "low": lambda run: groups.low_loss(run.test),
    }
    for task in (*groups.high, *groups.low):
        measures[task] = lambda run, task=task: run.test[task]

    def pair(names: tuple[str, str], number: int) -> tuple[Recipe, Recipe]:
        return chosen[names[0]][number], chosen[names[1]][number]

    first = pair(PRIMARY, 0)
    primary = estimate(list(differences(runs, *first, measures["S"]).values()))
    of_sets = [fmean(differences(own, *first, measures["S"]).values()) for own in sets]
    in_bytes = differences(runs, *first, lambda run: groups.measure(run.test_bits_per_byte))
    lines = [
        f"primary: {' - '.join(PRIMARY)}, S: {primary.mean:+.4f} ± {primary.half_width:.4f} "
        f"(p = {primary.p:.3g})",
        f"by set of documents: {', '.join(f'{each:+.4f}' for each in of_sets)}",
        f"bits per byte: {fmean(in_bytes.values()):+.4f}",
        "",
        "| settings | contrast | measure | difference | p | p after Holm |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = [
        (
            number,
            names,
            measure,
            estimate(list(differences(runs, *pair(names, number), of).values())),
        )
        for number in (0, 1)
        for names in (PRIMARY, *SECONDARY)
        for measure, of in measures.items()
        if (number, names, measure) != (0, PRIMARY, "S")
    ]
    corrected = holm([found.p for *_, found in rows])
    for (number, names, measure, found), p in zip(rows, corrected, strict=True):
        ordinal, contrast = ("first", "second")[number], " - ".join(names)
        value = f"{found.mean:+.4f} ± {found.half_width:.4f}"
        lines.append(f"| {ordinal} | {contrast} | {measure} | {value} | {found.p:.3g} | {p:.3g} |")
    return lines


def main(command: str, screen: str, *confirm: str) -> None:
    record = load_sweep_record(Path(screen))
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
