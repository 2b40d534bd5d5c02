"""Differences between arms at equal numbers of settings, with Student's t intervals over the seeds.

Of k random settings of each arm, k being the smaller of the two arms' numbers, the one with the
lowest mean loss of both groups on the validation split is chosen, and its losses on the reported
split count. The expectation over all choices of k settings is a sum over the settings, which is
taken for every seed; so the differences are paired by seed. Settings that were pruned are among
those that are drawn: they come last in the order, and at least one that was not is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.pareto.fronts import ArmFront, ModelFronts
from megaphase.sweep.pareto.points import Point, RunLosses
from megaphase.sweep.pareto.statistics import (
    Estimate,
    Sign,
    best_of_weights,
    chance_of_less,
    estimate,
)

Result = Literal["wins", "loses", "undecided"]


@dataclass(frozen=True)
class Differences:
    """An arm's losses less those of another, by seed; below 0 the arm is better.

    mean: of the high and the low loss. tasks: by task.
    """

    mean: Estimate
    high: Estimate
    low: Estimate
    tasks: Mapping[str, Estimate]

    def of(self, loss: str) -> Estimate:
        """Return the difference in `mean`, `high`, `low` or a task."""
        groups = {"mean": self.mean, "high": self.high, "low": self.low}
        return groups[loss] if loss in groups else self.tasks[loss]


@dataclass(frozen=True)
class Contrast:
    """An arm compared with another one, at an equal number of settings.

    Attributes:
        k: number of random settings of each arm, of which the best one is chosen.
        settings: number of settings of the arm and of the other.
        nats: differences in nats per token.
        bits: likewise in bits per byte; None if they are not known for all runs.
        best_of_all: difference in the mean loss, in nats, of the best of all settings of each arm,
            which favours the one with more of them.
        on_validation: difference in the mean loss, in nats, on the validation split.
        chance: probability that the choice from k random settings of the arm has the lower mean
            loss, averaged over the seeds, than that from k of the other.
    """

    arm: str
    against: str
    model: str | None
    k: int
    settings: tuple[int, int]
    nats: Differences
    bits: Differences | None
    best_of_all: Estimate
    on_validation: Estimate
    chance: float

    @property
    def seeds(self) -> int:
        """The number of seeds that both sides have."""
        return self.nats.mean.n

    @cached_property
    def sign(self) -> Sign:
        """-1 or 1 if the mean loss is decided, otherwise 0.

        In nats and in bits per byte alike, and also if each arm has the best of all its settings:
        an arm must neither win by its number of settings nor by that of the other's bad ones. And
        only if the mean on the validation split has the same sign: the intervals are about seeds,
        but the documents of a split are a sample, too.
        """
        signs = {each.mean.sign for each in (self.nats, self.bits) if each is not None}
        signs.add(self.best_of_all.sign)
        return signs.pop() if len(signs) == 1 and not self.is_reversed else 0

    @property
    def is_reversed(self) -> bool:
        """Whether the mean loss differs the other way on the validation split."""
        return self.on_validation.mean * self.nats.mean.mean < 0

    @property
    def paying(self) -> list[str]:
        """The tasks whose difference is decided the other way than the mean."""
        found = self.nats.tasks.items()
        return [task for task, each in found if self.sign != 0 and each.sign == -self.sign]

    @property
    def result(self) -> Result:
        """Whether the mean is decided, and no task pays for it."""
        if self.sign == 0 or self.paying:
            return "undecided"
        return "wins" if self.sign < 0 else "loses"


def baselines(fronts: ModelFronts) -> list[ArmFront]:
    """Return the arms with which every other one is compared."""
    return [arm for arm in fronts.arms if arm.is_baseline]


def contrasts_of(record: SweepRecord, fronts: Sequence[ModelFronts]) -> list[Contrast]:
    """Return every arm compared with every baseline, model by model, static arms excepted."""
    found = (
        contrast(arm, other, model.model)
        for model in fronts
        for arm in model.arms
        if arm.kind != "static"
        for other in baselines(model)
        if other is not arm
    )
    return [each for each in found if each is not None]


def primary_contrasts(record: SweepRecord, fronts: Sequence[ModelFronts]) -> list[Contrast]:
    """Return the contrasts that the sweep file names, model by model; see `PrimaryContrast`."""
    primary = record.sweep.config.primary
    if primary is None:
        return []
    found = []
    for model in fronts:
        arms = {arm.arm: arm for arm in model.arms}
        if primary.model in (None, model.model):
            found += [
                contrast(arms[primary.arm], arms[name], model.model) for name in primary.against
            ]
    return [each for each in found if each is not None]


def contrast(arm: ArmFront, other: ArmFront, model: str | None) -> Contrast | None:
    """Compare two arms; None while they have no seed in common."""
    if not arm.points or not other.points:
        return None
    k = min(arm.tried, other.tried)
    own, others = _Choice.of(arm, k), _Choice.of(other, k)
    best, best_other = (_Choice.of(each, each.tried) for each in (arm, other))
    seeds = [seed for seed in own.seeds if seed in others.seeds]
    if not seeds:
        return None
    bits = None
    if all(point.bits_by_seed is not None for point in (*own.points, *others.points)):
        bits = _differences(own, others, seeds, _bits)
    return Contrast(
        arm=arm.arm,
        against=other.arm,
        model=model,
        k=k,
        settings=(arm.tried, other.tried),
        nats=_differences(own, others, seeds, _nats),
        bits=bits,
        best_of_all=_paired(best, best_other, seeds, lambda point, seed: point.by_seed[seed].mean),
        on_validation=_paired(
            own, others, seeds, lambda point, seed: point.validation_by_seed[seed].mean
        ),
        chance=chance_of_less(*own.drawn, *others.drawn),
    )


@dataclass(frozen=True)
class _Choice:
    """The best of k random settings: those that it may be, and their probabilities."""

    points: Sequence[Point]
    weights: Sequence[float]

    @classmethod
    def of(cls, arm: ArmFront, k: int) -> _Choice:
        ordered = sorted(arm.points, key=lambda point: point.chosen_by.mean)
        weights = [weight for weight in best_of_weights(arm.tried, k) if weight > 0]
        if arm.pruned:
            weights = weights[: len(ordered)]
            total = math.fsum(weights)
            weights = [weight / total for weight in weights]
        return cls(ordered[: len(weights)], weights)

    @property
    def seeds(self) -> list[int]:
        """The seeds that all of these settings have."""
        return [
            seed
            for seed in self.points[0].by_seed
            if all(seed in point.by_seed for point in self.points)
        ]

    @property
    def drawn(self) -> tuple[list[float], Sequence[float]]:
        """The mean losses on the reported split, and their probabilities."""
        return [(point.high.mean + point.low.mean) / 2 for point in self.points], self.weights

    def expected(self, value: Callable[[Point], float]) -> float:
        """Return the expectation of a value."""
        pairs = zip(self.points, self.weights, strict=True)
        return math.fsum(weight * value(point) for point, weight in pairs)


def _nats(point: Point, seed: int) -> RunLosses:
    return point.by_seed[seed]


def _bits(point: Point, seed: int) -> RunLosses:
    assert point.bits_by_seed is not None
    return point.bits_by_seed[seed]


def _differences(
    own: _Choice,
    others: _Choice,
    seeds: Sequence[int],
    losses: Callable[[Point, int], RunLosses],
) -> Differences:
    def paired(value: Callable[[RunLosses], float]) -> Estimate:
        return _paired(own, others, seeds, lambda point, seed: value(losses(point, seed)))

    def of_task(task: str) -> Estimate:
        return paired(lambda each: each.tasks[task])

    return Differences(
        mean=paired(lambda each: each.mean),
        high=paired(lambda each: each.high),
        low=paired(lambda each: each.low),
        tasks={task: of_task(task) for task in own.points[0].losses},
    )


def _paired(
    own: _Choice, others: _Choice, seeds: Sequence[int], value: Callable[[Point, int], float]
) -> Estimate:
    def expected(choice: _Choice, seed: int) -> float:
        return choice.expected(lambda point: value(point, seed))

    return estimate([expected(own, seed) - expected(others, seed) for seed in seeds])
