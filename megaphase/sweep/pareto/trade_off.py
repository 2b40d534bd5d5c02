"""The figure of trade-off fronts: its marks, its limits, and the points outside of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megaphase.report.plot_parts import (
    PointLabel,
    label_points,
    legend_columns,
    legend_inches,
    legend_on_top,
    line_key,
    panel_grid,
)
from megaphase.sweep.pareto.arm_styles import ArmStyles
from megaphase.sweep.pareto.measures import nondominated
from megaphase.sweep.pareto.statistics import Estimate
from megaphase.utils.plot_style import GRID, Size, plot_label, plot_style

WINDOW = 0.7  # how far beyond the core, in its widths, a point is still shown
LEAST_WIDTH = 0.1  # of the core, in the unit of the axis
PADDING = 0.09
Limits = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A point of a panel. is_core: whether the limits must include it, if it is on its arm's
    front."""

    arm: str
    label: str
    x: Estimate
    y: Estimate
    is_core: bool


@dataclass(frozen=True)
class Panel:
    """Marks that are compared with each other.

    shaded: the arms whose dominated region is shaded.
    higher_is_better: for both axes.
    """

    title: str
    marks: Sequence[Mark]
    shaded: frozenset[str]
    higher_is_better: bool = False

    def front(self, arms: frozenset[str]) -> list[Mark]:
        """Return the marks that no other mark of these arms dominates, ascending in x."""
        sign = -1 if self.higher_is_better else 1
        marks = [mark for mark in self.marks if mark.arm in arms]
        chosen = nondominated([(sign * mark.x.mean, sign * mark.y.mean) for mark in marks])
        return sorted((marks[i] for i in chosen), key=lambda mark: mark.x.mean)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(mark.arm for mark in self.marks))

    def fronts(self) -> dict[str, list[Mark]]:
        """Return the front of each arm."""
        return {arm: self.front(frozenset({arm})) for arm in self.arms}


def limits_of(panel: Panel) -> tuple[Limits, Limits]:
    """Return limits of x and y that include all front points except those far from the core."""
    fronts = [mark for front in panel.fronts().values() for mark in front]
    core = [mark for mark in fronts if mark.is_core] or fronts
    near = [mark for mark in fronts if _is_near(mark, core)]
    return _padded(*_range([m.x.mean for m in near])), _padded(*_range([m.y.mean for m in near]))


def _is_near(mark: Mark, core: Sequence[Mark]) -> bool:
    for value, values in (
        (mark.x.mean, [each.x.mean for each in core]),
        (mark.y.mean, [each.y.mean for each in core]),
    ):
        low, high = _range(values)
        reach = WINDOW * (high - low)
        if not low - reach <= value <= high + reach:
            return False
    return True


def _range(values: Sequence[float]) -> Limits:
    low, high = min(values), max(values)
    missing = max(0.0, LEAST_WIDTH - (high - low)) / 2
    return low - missing, high + missing


def _padded(low: float, high: float) -> Limits:
    return low - PADDING * (high - low), high + PADDING * (high - low)


def outside(panel: Panel) -> tuple[list[Mark], int]:
    """Return the front points outside the limits, and the number of other points outside."""
    (left, right), (bottom, top) = limits_of(panel)
    out = [
        mark
        for mark in panel.marks
        if not (left <= mark.x.mean <= right and bottom <= mark.y.mean <= top)
    ]
    on_front = {id(mark) for front in panel.fronts().values() for mark in front}
    front = [mark for mark in out if id(mark) in on_front]
    return front, len(out) - len(front)


def trade_off_plot(
    panels: Sequence[Panel], styles: ArmStyles, axis_titles: tuple[str, str], size: Size
) -> Figure:
    """Return a figure with a panel per model: a point per setting, a step line per arm's front."""
    arms = [arm for arm in styles if any(arm in panel.arms for panel in panels)]
    names = [
        plot_label(arm) if _is_visible(arm, panels) else f"{plot_label(arm)} (outside)"
        for arm in arms
    ]
    keys = [
        line_key(name, styles[arm][0], marker=styles[arm][1], markersize=5, lw=1.6)
        for name, arm in zip(names, arms, strict=True)
    ]
    columns = legend_columns(names, size)
    height = size.height * (1.0 if len(panels) > 1 or size.narrow else 1.25)
    with plot_style():
        figure, all_axes = panel_grid(
            size, [panel.title for panel in panels], height, legend_inches(names, columns)
        )
        for panel, axes in zip(panels, all_axes, strict=True):
            axes.set_xlabel(axis_titles[0])
            axes.set_ylabel(axis_titles[1])
            if panel.marks:
                _draw(panel, axes, styles)
        legend_on_top(figure, keys, columns)
    return figure


def _is_visible(arm: str, panels: Sequence[Panel]) -> bool:
    """Return whether some point of the arm's front is inside the limits."""
    return any(
        mark not in outside(panel)[0]
        for panel in panels
        if arm in panel.arms
        for mark in panel.front(frozenset({arm}))
    )


def _draw(panel: Panel, axes: Axes, styles: ArmStyles) -> None:
    limits, (bottom, top) = limits_of(panel)
    axes.set_xlim(*limits)
    axes.set_ylim(bottom, top)
    _shade(panel, axes)
    fronts, labels, lines = panel.fronts(), [], []
    for arm, front in fronts.items():
        colour, marker = styles[arm]
        rest = [mark for mark in panel.marks if mark.arm == arm and mark not in front]
        axes.plot(
            [mark.x.mean for mark in rest], [mark.y.mean for mark in rest],
            ls="none", marker=marker, ms=4, color=colour, alpha=0.3, mew=0,
        )  # fmt: skip
        path = _steps(front, axes, panel.higher_is_better)
        lines.append(path)
        axes.plot(path[:, 0], path[:, 1], color=colour, lw=1.3, alpha=0.75)
        for mark in front:
            axes.errorbar(
                mark.x.mean, mark.y.mean, xerr=mark.x.error, yerr=mark.y.error,
                color=colour, marker=marker, ms=5.5, elinewidth=1.0, capsize=2, zorder=4,
            )  # fmt: skip
            if limits[0] <= mark.x.mean <= limits[1] and bottom <= mark.y.mean <= top:
                labels.append(PointLabel(mark.x.mean, mark.y.mean, mark.label, colour))
    label_points(axes, labels, lines)


def _steps(front: Sequence[Mark], axes: Axes, higher_is_better: bool) -> np.ndarray:
    """Return the border [n, 2] of the area that a front dominates, to the edges of the axes."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    xs = [mark.x.mean for mark in front]
    ys = [mark.y.mean for mark in front]
    if higher_is_better:
        corners = [(left, ys[0])]
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            corners += [(x, y), (x, ys[i + 1] if i + 1 < len(ys) else bottom)]
    else:
        corners = [(xs[0], top)]
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            corners += [(x, y), (xs[i + 1] if i + 1 < len(xs) else right, y)]
    return np.array(corners)


def _shade(panel: Panel, axes: Axes) -> None:
    front = panel.front(panel.shaded)
    if not front:
        return
    path = _steps(front, axes, panel.higher_is_better)
    edge = axes.get_ylim()[0 if panel.higher_is_better else 1]
    axes.fill_between(path[:, 0], path[:, 1], edge, color=GRID, alpha=0.55, lw=0, zorder=0)
