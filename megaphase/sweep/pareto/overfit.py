"""Overfitting: the increase of a low-resource task's loss since its minimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megaphase.sweep.pareto.curves import RunCurves, mean_curve
from megaphase.sweep.pareto.fronts import ModelFronts
from megaphase.sweep.pareto.points import Point


@dataclass(frozen=True)
class Overfit:
    """The overfitting of one task, averaged over the seeds; losses in nats per token.

    best: the lowest loss; risen: increase from there to the end. epochs: of the task's text, in
        all.
    """

    point: Point
    task: str
    best: float
    best_step: int
    end: float
    epochs: float

    @property
    def risen(self) -> float:
        return self.end - self.best


def single_stage_points(fronts: ModelFronts) -> list[Point]:
    """Return all settings of the arms of one phase.

    Not the best peak of each mixture alone: the best is more often one that has not overfit.
    """
    return [point for arm in fronts.arms for point in arm.points if len(point.setting.peaks) == 1]


def overfits(
    fronts: ModelFronts, curves: Mapping[str, RunCurves], low: Sequence[str]
) -> list[Overfit]:
    """Return the overfitting of every setting of the single-phase arms, task by task."""
    return [_overfit(point, curves, task) for point in single_stage_points(fronts) for task in low]


def _overfit(point: Point, curves: Mapping[str, RunCurves], task: str) -> Overfit:
    steps, losses = mean_curve(curves, point, [task], lambda run: run.validation)
    _, epochs = mean_curve(curves, point, [task], lambda run: run.epochs)
    lowest = int(np.nanargmin(losses))
    return Overfit(
        point, task, float(losses[lowest]), int(steps[lowest]), float(losses[-1]), float(epochs[-1])
    )
