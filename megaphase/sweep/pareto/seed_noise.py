"""Intervals of the plotted settings, without what a seed does to all of them alike.

The seed determines the initial weights and the order of samples, so it shifts the losses of all
settings together. Settings are compared with each other within a plot, and there this shift is no
noise. Cousineau (2005) subtracts each seed's mean over the settings; Morey (2008) corrects the
intervals, which would otherwise be too short, for the number of settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.pareto.points import Point, RunLosses
from megaphase.sweep.pareto.statistics import Estimate, estimate

BySeed = Mapping[int, float]


def without_shared_shift(values: Sequence[BySeed]) -> list[Estimate]:
    """Return the mean of every setting, with the error that remains without the seeds' shifts.

    values: by seed, of each setting. Settings without some of the seeds, and all of them if fewer
    than two have all seeds, keep the whole error.
    """
    seeds = {seed for each in values for seed in each}
    complete = [each for each in values if len(each) == len(seeds)]
    whole = [estimate(list(each.values())) for each in values]
    if len(complete) < 2 or len(seeds) < 2:
        return whole
    mean = fmean(value for each in complete for value in each.values())
    shift = {seed: fmean(each[seed] for each in complete) - mean for seed in seeds}
    correction = math.sqrt(len(complete) / (len(complete) - 1))
    found = []
    for each, plain in zip(values, whole, strict=True):
        if len(each) == len(seeds):
            left = estimate([value - shift[seed] for seed, value in each.items()])
            plain = Estimate(plain.mean, correction * (left.error or 0.0), plain.n)
        found.append(plain)
    return found


@dataclass(frozen=True)
class Drawn:
    """The high and the low loss of a setting as plotted."""

    high: Estimate
    low: Estimate


def drawn_losses(points: Sequence[Point]) -> dict[TriedSetting, Drawn]:
    """Return the losses of the points of one model, which are compared with each other."""
    groups = (
        without_shared_shift([_by_seed(point, lambda losses: losses.high) for point in points]),
        without_shared_shift([_by_seed(point, lambda losses: losses.low) for point in points]),
    )
    return {
        point.setting: Drawn(high, low) for point, high, low in zip(points, *groups, strict=True)
    }


def _by_seed(point: Point, value: Callable[[RunLosses], float]) -> BySeed:
    return {seed: value(losses) for seed, losses in point.by_seed.items()}


def error_sentence(points: Sequence[Point]) -> str:
    """Return what error bars of these points mean; empty if there are none."""
    counts = {len(point.runs) for point in points}
    if max(counts, default=0) < 2:
        return ""
    sentence = "Bars: 95% intervals of Student’s t over the seeds"
    seeds = {seed for point in points for seed in point.by_seed}
    complete = sum(len(point.by_seed) == len(seeds) for point in points)
    if complete >= 2:
        sentence += (
            ", without the shift that a seed gives to all settings alike "
            "(Cousineau’s method with Morey’s correction)"
        )
        if complete < len(points):
            sentence += "; settings without all of the seeds have the whole interval"
    return f"{sentence}. "
