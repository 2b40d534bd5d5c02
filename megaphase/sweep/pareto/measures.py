"""Measures of trade-off fronts in the plane, where less is better in both coordinates.

Only points that were measured count: nothing is interpolated between two of them.
"""

from __future__ import annotations

from collections.abc import Sequence

Pair = tuple[float, float]


def dominates(a: Pair, b: Pair) -> bool:
    """Whether `a` is no worse than `b` in both coordinates, and better in one."""
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def nondominated(pairs: Sequence[Pair]) -> list[int]:
    """Indices of the pairs that no other one dominates, ascending in the first coordinate.

    Of equal pairs all stay.
    """
    front: list[int] = []
    for i in sorted(range(len(pairs)), key=lambda i: pairs[i]):
        # In this order, whatever dominates a pair comes before it, the last of the front lowest.
        if not front or pairs[i][1] < pairs[front[-1]][1] or pairs[i] == pairs[front[-1]]:
            front.append(i)
    return front


def hypervolume(pairs: Sequence[Pair], reference: Pair) -> float:
    """The area that the pairs dominate, up to the reference point; 0 for what is beyond it."""
    area, ceiling = 0.0, reference[1]
    for x, y in (pairs[i] for i in nondominated(pairs)):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area


def count_dominated(front: Sequence[Pair], by: Sequence[Pair]) -> int:
    """How many points of a front some point of another one dominates."""
    return sum(any(dominates(other, point) for other in by) for point in front)


def lowest_within(pairs: Sequence[Pair], limit: float) -> int | None:
    """The index of the lowest second coordinate among the pairs whose first is within the limit."""
    within = [i for i, pair in enumerate(pairs) if pair[0] <= limit]
    return min(within, key=lambda i: (pairs[i][1], pairs[i][0]), default=None)
