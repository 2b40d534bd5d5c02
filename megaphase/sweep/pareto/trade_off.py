"""The figure of trade-off fronts: its marks, its limits, and the points outside of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megaphase.report.plot_parts import (
    PointLabel,
    label_points,
    left_out_note,
    legend_columns,
    legend_inches,
    legend_on_top,
    line_key,
    note_on_panel,
    panel_grid,
)
from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.pareto.arm_styles import ArmStyles
from megaphase.sweep.pareto.measures import nondominated
from megaphase.sweep.pareto.statistics import Estimate
from megaphase.utils.plot_style import GRID, Size, plot_label, plot_style

WINDOW = 0.7  # how much worse than the core, in its widths, a point is still shown
LEAST_WIDTH = 0.1  # of the core, in the unit of the axis
PADDING = 0.09
BAR_ALPHA = 0.5
# Like error bars, the lines of a front run parallel to the axes, so fronts are dashed.
DASHES = (0, (3, 1))
Limits = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A point of a panel.

    on_front: whether it is on its arm's front; the others are drawn faintly.
    is_core: whether the limits must include it, if it is on the front.
    """

    setting: TriedSetting
    label: str
    x: Estimate
    y: Estimate
    is_core: bool
    on_front: bool

    @property
    def arm(self) -> str:
        return self.setting.arm


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

    def border(self, arms: frozenset[str]) -> list[Mark]:
        """Return the marks on the fronts of these arms that no other one of them dominates,
        ascending in x."""
        sign = -1 if self.higher_is_better else 1
        marks = [mark for mark in self.marks if mark.on_front and mark.arm in arms]
        chosen = nondominated([(sign * mark.x.mean, sign * mark.y.mean) for mark in marks])
        return sorted((marks[i] for i in chosen), key=lambda mark: mark.x.mean)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(mark.arm for mark in self.marks))

    @property
    def on_fronts(self) -> list[Mark]:
        """The marks on the fronts of their arms."""
        return [mark for mark in self.marks if mark.on_front]


def limits_of(panel: Panel) -> tuple[Limits, Limits]:
    """Return limits of x and y that include all front points except those much worse than the core
    in x or y."""
    fronts = panel.on_fronts
    core = [mark for mark in fronts if mark.is_core] or fronts
    shown = [mark for mark in fronts if not _is_much_worse(mark, core, panel.higher_is_better)]
    return _padded(*_range([m.x.mean for m in shown])), _padded(*_range([m.y.mean for m in shown]))


def _is_much_worse(mark: Mark, core: Sequence[Mark], higher_is_better: bool) -> bool:
    """Return whether a mark is far beyond the worst of the core in x or y."""
    for value, values in (
        (mark.x.mean, [each.x.mean for each in core]),
        (mark.y.mean, [each.y.mean for each in core]),
    ):
        low, high = _range(values)
        reach = WINDOW * (high - low)
        if (value < low - reach) if higher_is_better else (value > high + reach):
            return True
    return False


def _range(values: Sequence[float]) -> Limits:
    low, high = min(values), max(values)
    missing = max(0.0, LEAST_WIDTH - (high - low)) / 2
    return low - missing, high + missing


def _padded(low: float, high: float) -> Limits:
    return low - PADDING * (high - low), high + PADDING * (high - low)


def outside(panel: Panel) -> tuple[list[Mark], int]:
    """Return the front points outside the limits, and the number of other points outside."""
    out = outside_marks(panel)
    front = [mark for mark in out if mark.on_front]
    return front, len(out) - len(front)


def outside_marks(panel: Panel) -> list[Mark]:
    """Return all points outside the limits."""
    limits = limits_of(panel) if panel.marks else None
    return [mark for mark in panel.marks if limits and not _is_inside(mark, limits)]


def _is_inside(mark: Mark, limits: tuple[Limits, Limits]) -> bool:
    (left, right), (bottom, top) = limits
    return left <= mark.x.mean <= right and bottom <= mark.y.mean <= top


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
        line_key(name, styles[arm][0], marker=styles[arm][1], markersize=5, lw=1.6, ls=DASHES)
        for name, arm in zip(names, arms, strict=True)
    ]
    columns = legend_columns(names, size)
    height = size.height * (1.0 if len(panels) > 1 or size.narrow else 1.25)
    with plot_style():
        # A blank title leaves space for the note on what is outside.
        titles = [panel.title or " " for panel in panels]
        figure, all_axes = panel_grid(size, titles, height, legend_inches(names, columns))
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
        _is_inside(mark, limits_of(panel))
        for panel in panels
        for mark in panel.on_fronts
        if mark.arm == arm
    )


def _draw(panel: Panel, axes: Axes, styles: ArmStyles) -> None:
    limits = limits_of(panel)
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])
    _shade(panel, axes)
    labels, lines = [], []
    for arm in panel.arms:
        colour, marker = styles[arm]
        marks = [mark for mark in panel.marks if mark.arm == arm]
        rest = [mark for mark in marks if not mark.on_front]
        axes.plot(
            [mark.x.mean for mark in rest], [mark.y.mean for mark in rest],
            ls="none", marker=marker, ms=4, color=colour, alpha=0.3, mew=0,
        )  # fmt: skip
        if border := panel.border(frozenset({arm})):
            path = _steps(border, axes, panel.higher_is_better)
            lines.append(path)
            axes.plot(path[:, 0], path[:, 1], color=colour, lw=1.3, alpha=0.75, ls=DASHES)
        front = [mark for mark in marks if mark.on_front]
        shown = [mark for mark in front if _is_inside(mark, limits)]
        for mark in front:
            if mark not in shown:
                _point_out(mark, axes, colour)
        if shown:
            _, caps, bars = axes.errorbar(
                [mark.x.mean for mark in shown], [mark.y.mean for mark in shown],
                xerr=_half_widths([mark.x for mark in shown], limits[0]),
                yerr=_half_widths([mark.y for mark in shown], limits[1]),
                color=colour, marker=marker, ms=5.5, lw=0, elinewidth=1.0, capsize=2, zorder=4,
            )  # fmt: skip
            for each in (*caps, *bars):
                each.set_alpha(BAR_ALPHA)
        labels += [PointLabel(mark.x.mean, mark.y.mean, mark.label, colour) for mark in shown]
    left_out = left_out_note(label_points(axes, labels, lines))
    note_on_panel(axes, outside_note(panel), bars_note(panel), left_out)


def _half_widths(values: Sequence[Estimate], limits: Limits) -> list[float]:
    """Return the lengths of error bars; NaN draws none, as of one that crosses the whole panel."""
    return [
        math.nan if each.half_width is None or _ends_outside(each, limits) == 2 else each.half_width
        for each in values
    ]


def bars_note(panel: Panel) -> str:
    """Return how many error bars of points inside the limits are not; empty if all are."""
    limits = limits_of(panel)
    ends = Counter(
        _ends_outside(value, each)
        for mark in panel.on_fronts
        if _is_inside(mark, limits)
        for value, each in zip((mark.x, mark.y), limits, strict=True)
    )
    cut, crossing = ends[1], ends[2]
    notes = [
        f"{_bars(cut)} cut off" if cut else "",
        f"{_bars(crossing)} longer than the picture not drawn" if crossing else "",
    ]
    return "; ".join(note for note in notes if note)


def _bars(count: int) -> str:
    return f"{count} {'bar' if count == 1 else 'bars'}"


def _ends_outside(value: Estimate, limits: Limits) -> int:
    """Return how many ends of an error bar are outside the limits."""
    (low, high), half = limits, value.half_width or 0.0
    return (value.mean - half < low) + (value.mean + half > high)


def _point_out(mark: Mark, axes: Axes, colour: str) -> None:
    """Draw an arrowhead on the edge next to a point outside the limits."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x, y = mark.x.mean, mark.y.mean
    head = "<" if x < left else ">" if x > right else "v" if y < bottom else "^"
    axes.plot(
        min(max(x, left), right), min(max(y, bottom), top),
        marker=head, ms=7, color=colour, mec="none", ls="none", clip_on=False, zorder=5,
    )  # fmt: skip


def outside_note(panel: Panel) -> str:
    """Return how many settings are outside the limits, for the figure; empty if none is."""
    front, others = outside(panel)
    count = len(front) + others
    if not count:
        return ""
    arrows = f", {len(front)} at arrowheads" if front else ""
    return f"{count} {'setting' if count == 1 else 'settings'} outside{arrows}"


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
    front = panel.border(panel.shaded)
    if not front:
        return
    path = _steps(front, axes, panel.higher_is_better)
    edge = axes.get_ylim()[0 if panel.higher_is_better else 1]
    axes.fill_between(path[:, 0], path[:, 1], edge, color=GRID, alpha=0.55, lw=0, zorder=0)
