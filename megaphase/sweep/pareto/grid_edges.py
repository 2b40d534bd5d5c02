"""Best settings that lie at an edge of the grid of values that were tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megaphase.sweep.pareto.fronts import ModelFronts
from megaphase.sweep.pareto.points import Point, best_of

NAMES = {"pretrain_share": "pre-training", "learning_rate.peak": "peak"}


def grid_edges_sentence(models: Sequence[ModelFronts]) -> str | None:
    """Name the arms whose best setting has the highest or the lowest value of an axis, since a
    better one may lie beyond it; None if there are none."""
    found = [
        f"{'' if fronts.model is None else f'{fronts.model}, '}{arm.arm} ({', '.join(edges)})"
        for fronts in models
        for arm in fronts.arms
        if (best := best_of(arm.points)) is not None and (edges := list(_edges(best, arm.points)))
    ]
    if not found:
        return None
    return (
        "Best settings at an end of the values that were tried, beyond which a better one may lie: "
        f"{'; '.join(found)}."
    )


def _edges(best: Point, points: Sequence[Point]) -> Iterator[str]:
    for axis, value in best.setting.values:
        tried = [point.setting.get(axis) for point in points]
        numbers = [each for each in tried if isinstance(each, int | float)]
        if isinstance(value, str | bool) or value is None or len(set(numbers)) < 2:
            continue
        for end, name in ((max(numbers), "highest"), (min(numbers), "lowest")):
            if value == end:
                yield f"{name} {_name(axis)}"


def _name(axis: str) -> str:
    known = (name for end, name in NAMES.items() if axis == end or axis.endswith(f".{end}"))
    return next(known, axis.split(".")[-1])
