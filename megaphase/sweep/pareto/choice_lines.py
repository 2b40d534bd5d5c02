"""Which points of a figure over one choice are joined: only those that differ in it alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal, NamedTuple

from megaphase.sweep.pareto.labels import is_length, is_peak
from megaphase.sweep.pareto.points import Point, best_of

Fixed = Literal["total", "last phase"]


class Line(NamedTuple):
    """Points of settings that differ in the choice alone, ascending in it; they are joined."""

    arm: str
    points: Sequence[tuple[float, Point]]


class ChoiceLines(NamedTuple):
    """What a figure over a choice shows.

    Attributes:
        lines: for every arm and mixture, that with most of the best settings.
        lone: the best settings of a place on the axis that are on no line; they are not joined.
    """

    lines: Sequence[Line]
    lone: Sequence[tuple[float, Point]]

    @property
    def all(self) -> list[tuple[float, Point]]:
        """All points with their places on the axis."""
        return [each for line in self.lines for each in line.points] + list(self.lone)

    @property
    def arms(self) -> list[str]:
        """The arms that are shown."""
        return list(dict.fromkeys(point.setting.arm for _, point in self.all))


Key = Callable[[Point], Hashable]


def lines_over(
    points: Iterable[Point],
    place: Callable[[Point], float],
    family: Key,
    same: Key,
    fewest_places: int = 2,
) -> ChoiceLines:
    """Return lines over a choice.

    place: on the axis. family: what the points share of which each place shows the best one.
    same: everything but the place on the axis that points on one line must share. fewest_places:
    families at fewer places are left out.
    """
    families: dict[Hashable, list[Point]] = {}
    for point in points:
        families.setdefault(family(point), []).append(point)
    lines: list[Line] = []
    lone: list[tuple[float, Point]] = []
    for members in families.values():
        best = _best_at_each_place(members, place)
        if len(best) < fewest_places:
            continue
        line = _line(members, best, place, same)
        if line is not None:
            lines.append(line)
        joined = [] if line is None else [id(point) for _, point in line.points]
        lone += [(x, point) for x, point in sorted(best.items()) if id(point) not in joined]
    return ChoiceLines(lines, lone)


def _best_at_each_place(
    members: Sequence[Point], place: Callable[[Point], float]
) -> dict[float, Point]:
    places: dict[float, list[Point]] = {}
    for point in members:
        places.setdefault(place(point), []).append(point)
    found = {x: best_of(each) for x, each in places.items()}
    return {x: point for x, point in found.items() if point is not None}


def _line(
    members: Sequence[Point],
    best: dict[float, Point],
    place: Callable[[Point], float],
    same: Key,
) -> Line | None:
    """Return the longest of the lines with most of the best points."""
    groups: dict[Hashable, dict[float, Point]] = {}
    for point in members:
        groups.setdefault(same(point), {}).setdefault(place(point), point)
    winners = {id(point) for point in best.values()}

    def rank(group: dict[float, Point]) -> tuple[int, int]:
        return sum(id(point) in winners for point in group.values()), len(group)

    candidates = [group for group in groups.values() if len(group) > 1]
    chosen = max(candidates, key=rank, default=None)
    if chosen is None:
        return None
    points = sorted(chosen.items())
    return Line(points[0][1].setting.arm, points)


def pretraining_lines(points: Sequence[Point], fixed: Fixed) -> ChoiceLines:
    """Return lines over the length of the first phase, for arms that try several.

    Either the budget or the length of the last phase is the same along a line, as are the phases
    between them. Places are shares of the budget, or else steps.
    """
    staged = [point for point in points if len(steps_of(point)) > 1]

    def place(point: Point) -> float:
        steps = steps_of(point)
        return steps[0] / sum(steps) if fixed == "total" else float(steps[0])

    def family(point: Point) -> Hashable:
        setting, steps = point.setting, steps_of(point)
        kept = tuple(
            each for each in setting.values if not (is_length(each[0]) or is_peak(each[0]))
        )
        length = sum(steps) if fixed == "total" else steps[-1]
        return setting.arm, setting.model, kept, setting.mixture, steps[1:-1], length

    return lines_over(
        staged, place, family, lambda point: (family(point), point.setting.peaks)
    )  # fmt: skip


def model_lines(points: Sequence[Point], models: Sequence[str | None]) -> ChoiceLines:
    """Return lines over the models, whose places are their indices, of every arm's best points."""

    def same(point: Point) -> Hashable:
        setting = point.setting
        return setting.arm, setting.values, setting.mixture, setting.share, setting.peaks

    return lines_over(
        points,
        lambda point: float(models.index(point.setting.model)),
        lambda point: point.setting.arm,
        same,
        fewest_places=1,
    )


def steps_of(point: Point) -> tuple[int, ...]:
    """Return the steps of each phase of a point's recipe, first to last."""
    return tuple(phase["steps"] for phase in point.runs[0][0].phases)
