"""How many low-resource tokens every setting has seen when it first reaches a loss.

The same rule for all arms: of the curve of the low-resource loss, which is the mean over the tasks
and the seeds at every validation, the first point at or below the level counts, on the straight
line from the validation before. What a run does afterwards, such as overfitting, costs no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megaphase.sweep.pareto.curves import RunCurves, mean_curve
from megaphase.sweep.pareto.fronts import ModelFronts
from megaphase.sweep.pareto.points import Point, best_of
from megaphase.sweep.pareto.statistics import ROUNDING


class Level(NamedTuple):
    """A low-resource loss in nats per token: that of an arm's best setting at its end."""

    arm: str
    loss: float


class Reached(NamedTuple):
    """When a curve first reaches a level, in tokens of all low-resource tasks and in steps."""

    tokens: float
    step: float


@dataclass(frozen=True)
class SettingReach:
    """When a setting first reaches a level; `reached` is None if it never does."""

    point: Point
    level: Level
    reached: Reached | None


def levels_of(fronts: ModelFronts) -> list[Level]:
    """Return the losses of the arms' best settings on the validation split, highest first."""
    best = [(arm.arm, best_of(arm.points)) for arm in fronts.arms]
    levels = [Level(arm, point.chosen_by.low) for arm, point in best if point is not None]
    return sorted(levels, key=lambda level: -level.loss)


def reaches(
    fronts: ModelFronts, curves: Mapping[str, RunCurves], low: Sequence[str]
) -> list[SettingReach]:
    """Return when each setting first reaches each level, in the order of the levels."""
    levels = levels_of(fronts)
    found = []
    for point in fronts.points:
        steps, losses = mean_curve(curves, point, low, lambda run: run.validation)
        _, tokens = mean_curve(curves, point, low, lambda run: run.tokens)
        for level in levels:
            first = first_reach(list(steps), list(tokens * len(low)), list(losses), level.loss)
            found.append(SettingReach(point, level, first))
    return sorted(found, key=lambda each: levels.index(each.level))


def first_reach(
    steps: Sequence[int], tokens: Sequence[float], losses: Sequence[float], level: float
) -> Reached | None:
    """Return where a curve is first at or below a level, interpolated between two validations."""
    for i, loss in enumerate(losses):
        if loss <= level + ROUNDING:
            if i == 0 or losses[i - 1] <= loss:
                return Reached(tokens[i], steps[i])
            part = min((losses[i - 1] - level) / (losses[i - 1] - loss), 1.0)
            return Reached(
                tokens[i - 1] + part * (tokens[i] - tokens[i - 1]),
                steps[i - 1] + part * (steps[i] - steps[i - 1]),
            )
    return None
