"""The fronts of a sweep's arms with each model, each compared with the static one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megaphase.sweep.arms.config import Kind
from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.pareto.baselines import is_baseline
from megaphase.sweep.pareto.measures import (
    Pair,
    count_dominated,
    hypervolume,
    lowest_within,
)
from megaphase.sweep.pareto.points import Point, front_of, points_of
from megaphase.sweep.pareto.pruned import pruned_of_arm, pruned_settings
from megaphase.sweep.pareto.statistics import Estimate, estimate


@dataclass(frozen=True)
class Margin:
    """How much lower another front's low loss is than a point's, at no higher high loss.

    Attributes:
        point: the point of the front that is compared with.
        other: the other front's lowest point at no higher high loss, both on the validation split;
            None if it has none there.
    """

    point: Point
    other: Point | None

    @cached_property
    def estimate(self) -> Estimate | None:
        """The difference in nats on the reported split, above 0 if the other is better.

        Over the seeds that both sides have: the seed determines the initial weights and the order
        of samples, whose effect on both losses cancels in their difference. None if there is no
        other, or no such seed.
        """
        if self.other is None:
            return None
        own, other = self.point.by_seed, self.other.by_seed
        differences = [
            losses.low - other[seed].low for seed, losses in own.items() if seed in other
        ]
        return estimate(differences) if differences else None

    @property
    def nats(self) -> float | None:
        """The mean difference."""
        return None if self.estimate is None else self.estimate.mean


@dataclass(frozen=True)
class Comparison:
    """An arm's front compared with the static one.

    Attributes:
        dominated: number of points of the static front that the arm's dominates.
        dominated_by: number of points of the arm's front that the static one dominates.
        margins: of the arm, at every point of the static front.
        margins_of_static: of the static front, at every point of the arm's.
    """

    dominated: int
    dominated_by: int
    margins: Sequence[Margin]
    margins_of_static: Sequence[Margin]

    @property
    def share(self) -> float:
        """The fraction of the static front that is dominated."""
        return self.dominated / len(self.margins)


@dataclass(frozen=True)
class ArmFront:
    """An arm with one model.

    Attributes:
        points: of all of its settings.
        hypervolume: of the front, in nats squared; None if the whole model has no point.
        against_static: None for static arms, and while either side has no point.
        pruned: number of settings that were tried besides, and stopped early.
        is_baseline: whether the others are compared with it; see `is_baseline`.
    """

    arm: str
    kind: Kind
    points: Sequence[Point]
    front: Sequence[Point]
    hypervolume: float | None
    against_static: Comparison | None
    is_baseline: bool = False
    pruned: int = 0

    @property
    def tried(self) -> int:
        """The number of settings among which the best is chosen."""
        return len(self.points) + self.pruned


@dataclass(frozen=True)
class ModelFronts:
    """The arms with one model.

    Attributes:
        reference: reference point of the hypervolume, the worst high and the worst low loss over
            all settings of the static arms, or of all arms if those have no point.
        static: the front of all static arms together, the envelope of their fronts.
    """

    model: str | None
    arms: Sequence[ArmFront]
    reference: Pair | None
    static: Sequence[Point]

    @property
    def static_hypervolume(self) -> float | None:
        """The hypervolume of the static front; None without one."""
        if self.reference is None or not self.static:
            return None
        return hypervolume(_pairs(self.static), self.reference)

    @property
    def is_compared(self) -> bool:
        """Whether any arm is compared with static ones."""
        return any(arm.against_static is not None for arm in self.arms)

    @property
    def points(self) -> list[Point]:
        """The points of all arms."""
        return [point for arm in self.arms for point in arm.points]


def fronts_of(record: SweepRecord) -> list[ModelFronts]:
    """Return the fronts of every model, in the sweep's order."""
    models: list[str | None] = [*record.sweep.config.models] or [None]
    points = points_of(record)
    return [
        _model_fronts(record, model, [point for point in points if point.setting.model == model])
        for model in models
    ]


def _model_fronts(record: SweepRecord, model: str | None, points: Sequence[Point]) -> ModelFronts:
    kinds = {arm: record.sweep.kind(arm) for arm in record.sweep.config.arms}
    static = [point for point in points if kinds[point.setting.arm] == "static"]
    reference = worst(static or points)
    envelope = front_of(static)
    arms, pruned = [], pruned_settings(record)
    for arm, kind in kinds.items():
        own = [point for point in points if point.setting.arm == arm]
        front = front_of(own)
        volume = None if reference is None else hypervolume(_pairs(front), reference)
        against = compare(front, envelope) if kind != "static" and front and envelope else None
        arms.append(
            ArmFront(
                arm, kind, own, front, volume, against,
                is_baseline=is_baseline(record, arm),
                pruned=pruned_of_arm(pruned, arm, model),
            )
        )  # fmt: skip
    return ModelFronts(model, arms, reference, envelope)


def worst(points: Sequence[Point]) -> Pair | None:
    """Return the highest high loss and the highest low loss."""
    if not points:
        return None
    return max(point.high.mean for point in points), max(point.low.mean for point in points)


def compare(front: Sequence[Point], static: Sequence[Point]) -> Comparison:
    """Compare a front with the static one, on the reported split."""
    return Comparison(
        dominated=count_dominated(_pairs(static), _pairs(front)),
        dominated_by=count_dominated(_pairs(front), _pairs(static)),
        margins=_margins(static, front),
        margins_of_static=_margins(front, static),
    )


def _margins(points: Sequence[Point], others: Sequence[Point]) -> list[Margin]:
    candidates = [(each.chosen_by.high, each.chosen_by.low) for each in others]
    found = [lowest_within(candidates, point.chosen_by.high) for point in points]
    return [
        Margin(point, None if i is None else others[i])
        for point, i in zip(points, found, strict=True)
    ]


def _pairs(points: Sequence[Point]) -> list[Pair]:
    return [point.pair for point in points]
