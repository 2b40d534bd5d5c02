"""Orders in which settings are kept, best first; less is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from megaphase.sweep.pareto.measures import Pair, nondominated


def by_loss(losses: Sequence[float]) -> list[int]:
    """Return the indices from the lowest loss to the highest; of equal ones, the first first."""
    return sorted(range(len(losses)), key=lambda i: (losses[i], i))


def by_fronts(pairs: Sequence[Pair]) -> list[int]:
    """Return the indices front by front, as NSGA-II does (Deb et al. 2002).

    The first front holds the pairs that no other one dominates, the second those that are then not
    dominated any more, and so on. Of the first front the pair with the lowest mean comes first,
    since settings are compared by means. Within a front the ends follow, then those with the
    largest crowding distance, so that what is kept spreads over it. Of equal ones the lower mean
    comes first. Pairs that are not finite come last.
    """
    finite = [i for i, pair in enumerate(pairs) if all(map(math.isfinite, pair))]
    order = sorted(finite, key=lambda i: (fmean(pairs[i]), i))[:1]
    left = finite
    while left:
        front = [left[i] for i in nondominated([pairs[i] for i in left])]
        distances = _crowding([pairs[i] for i in front])
        by_distance = dict(zip(front, distances, strict=True))
        in_order = sorted(front, key=lambda i: (-by_distance[i], fmean(pairs[i]), i))
        order += [i for i in in_order if i not in order]
        left = [i for i in left if i not in by_distance]
    return order + [i for i in range(len(pairs)) if i not in order]


def _crowding(front: Sequence[Pair]) -> list[float]:
    """Return the crowding distances of a front in its order: the sides of the box between the
    neighbours, each divided by the front's extent; infinite at the ends."""
    (first_x, first_y), (last_x, last_y) = front[0], front[-1]
    extents = last_x - first_x, first_y - last_y
    if len(front) < 3 or not all(extents):
        return [math.inf] * len(front)
    inner = (
        (after[0] - before[0]) / extents[0] + (before[1] - after[1]) / extents[1]
        for before, after in zip(front, front[2:], strict=False)
    )
    return [math.inf, *inner, math.inf]
