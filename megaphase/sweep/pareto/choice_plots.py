"""Figures of final losses and scores over pre-training length, model size or task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megaphase.report.plot_parts import (
    BOTTOM_INCHES,
    PointLabel,
    label_points,
    legend_columns,
    legend_inches,
    legend_on_top,
    line_key,
    panel_grid,
)
from megaphase.sweep.pareto.arm_styles import ArmStyles
from megaphase.sweep.pareto.points import Point
from megaphase.sweep.pareto.statistics import Estimate
from megaphase.utils.plot_style import (
    Size,
    inch_axes,
    label_width,
    new_figure,
    plot_label,
    plot_style,
)

GROUPS = ("high-resource loss", "low-resource loss")


class Line(NamedTuple):
    """Final losses along a choice. label: shown at its end, in the arm's colour."""

    arm: str
    label: str
    points: Sequence[tuple[float, Point]]


def choice_plot(
    lines: Sequence[Line], title: str, ticks: Mapping[float, str], styles: ArmStyles, size: Size
) -> Figure:
    """Return a figure of high and low loss over a choice, whose values are named on the x axis."""
    arms = list(dict.fromkeys(line.arm for line in lines))
    columns = legend_columns(arms, size)
    keys = [line_key(plot_label(arm), styles[arm][0], marker=styles[arm][1], ms=5) for arm in arms]
    with plot_style():
        figure, panels = panel_grid(size, GROUPS, 0.85 * size.height, legend_inches(arms, columns))
        for axes, group in zip(panels, ("high", "low"), strict=True):
            axes.set_ylabel("nats per token")
            axes.set_xlabel(title)
            axes.set_xticks(list(ticks), [plot_label(name) for name in ticks.values()])
            _draw_lines(axes, lines, group, styles)
        legend_on_top(figure, keys, columns)
    return figure


def _draw_lines(axes: Axes, lines: Sequence[Line], group: str, styles: ArmStyles) -> None:
    labels, paths = [], []
    for arm, label, points in lines:
        colour, marker = styles[arm]
        xs = [x for x, _ in points]
        losses: list[Estimate] = [getattr(point, group) for _, point in points]
        axes.errorbar(
            xs, [loss.mean for loss in losses], yerr=[loss.error or 0.0 for loss in losses],
            color=colour, marker=marker, ms=4.5, lw=1.4, elinewidth=1.0,
        )  # fmt: skip
        paths.append(np.column_stack([xs, [loss.mean for loss in losses]]))
        labels.append(PointLabel(xs[-1], losses[-1].mean, label, colour))
    axes.margins(x=0.14)
    label_points(axes, [label for label in labels if label.text], paths)


class Score(NamedTuple):
    """BLEU or chrF of a task with an arm."""

    task: str
    arm: str
    value: Estimate


def score_plot(scores: Mapping[str, Sequence[Score]], styles: ArmStyles, size: Size) -> Figure:
    """Return a figure with a panel per measure and a bar per task and arm."""
    arms = list(dict.fromkeys(each.arm for values in scores.values() for each in values))
    tasks = list(dict.fromkeys(each.task for values in scores.values() for each in values))
    columns = legend_columns(arms, size)
    keys = [line_key(plot_label(arm), styles[arm][0], lw=5) for arm in arms]
    top, left = legend_inches(arms, columns) + 0.1, 0.15 + label_width(tasks)
    panel = 0.2 * (len(arms) + 1) * len(tasks) + BOTTOM_INCHES + 0.25
    rows = len(scores) if size.narrow else 1
    width = (size.width - 0.1) / (len(scores) // rows)
    with plot_style():
        figure = new_figure(size.width, rows * panel + top)
        for i, (title, values) in enumerate(scores.items()):
            x, y = (0.0, (rows - 1 - i) * panel) if size.narrow else (i * width, 0.0)
            axes = inch_axes(figure, x + left, y + BOTTOM_INCHES, x + width - 0.5, y + panel - 0.05)
            axes.set_xlabel(title)
            _bars(axes, values, tasks, arms, styles)
        legend_on_top(figure, keys, columns)
    return figure


def _bars(
    axes: Axes,
    scores: Sequence[Score],
    tasks: Sequence[str],
    arms: Sequence[str],
    styles: ArmStyles,
) -> None:
    height = 1 / (len(arms) + 1)
    for task, arm, value in scores:
        row = tasks.index(task) + (arms.index(arm) - (len(arms) - 1) / 2) * height
        axes.barh(row, value.mean, 0.86 * height, color=styles[arm][0], xerr=value.error)
        axes.annotate(
            f"{value.mean:.1f}", (value.mean + (value.error or 0.0), row), (4, 0),
            textcoords="offset points", va="center_baseline", fontsize=8.5,
        )  # fmt: skip
    axes.set_yticks(range(len(tasks)), [plot_label(task) for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(False, axis="y")
