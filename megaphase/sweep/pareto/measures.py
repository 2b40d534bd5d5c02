"""Measures of trade-off fronts in the plane; less is better in both coordinates.

Only measured points count: nothing is interpolated between them.
"""

from __future__ import annotations

from collections.abc import Sequence

Pair = tuple[float, float]


def dominates(a: Pair, b: Pair) -> bool:
    """Return whether `a` is no worse than `b` in both coordinates, and better in one."""
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def nondominated(pairs: Sequence[Pair]) -> list[int]:
    """Return the indices of the pairs that no other one dominates, ascending in the first
    coordinate.

    Equal pairs are all kept.
    """
    front: list[int] = []
    for i in sorted(range(len(pairs)), key=lambda i: pairs[i]):
        # In this order, a pair that dominates another precedes it, and the front's last one is
        # lowest.
        if not front or pairs[i][1] < pairs[front[-1]][1] or pairs[i] == pairs[front[-1]]:
            front.append(i)
    return front


def hypervolume(pairs: Sequence[Pair], reference: Pair) -> float:
    """Return the area dominated by the pairs up to the reference point; 0 for pairs beyond it."""
    area, ceiling = 0.0, reference[1]
    for x, y in (pairs[i] for i in nondominated(pairs)):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area


def count_dominated(front: Sequence[Pair], by: Sequence[Pair]) -> int:
    """Return how many points of a front are dominated by some point of another one."""
    return sum(any(dominates(other, point) for other in by) for point in front)


def lowest_within(pairs: Sequence[Pair], limit: float) -> int | None:
    """Return the index of the lowest second coordinate among pairs whose first is <= `limit`."""
    within = [i for i, pair in enumerate(pairs) if pair[0] <= limit]
    return min(within, key=lambda i: (pairs[i][1], pairs[i][0]), default=None)
