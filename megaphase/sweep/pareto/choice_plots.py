"""Figures of final losses and scores over pre-training length, model size or task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megaphase.report.plot_parts import (
    BOTTOM_INCHES,
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
from megaphase.sweep.pareto.choice_lines import ChoiceLines
from megaphase.sweep.pareto.points import Point
from megaphase.sweep.pareto.seed_noise import Drawn
from megaphase.sweep.pareto.statistics import Estimate
from megaphase.utils.plot_style import (
    Size,
    inch_axes,
    label_width,
    new_figure,
    plot_label,
    plot_style,
)

TICK_WIDTH = 0.12  # of the axis, of a tick's label
LABEL_ROOM = 0.15  # of the axis, beyond the last point and its margin
GROUPS = ("high-resource loss", "low-resource loss")


def choice_plot(
    lines: ChoiceLines,
    losses: Mapping[TriedSetting, Drawn],
    name: Callable[[TriedSetting], str],
    title: str,
    ticks: Mapping[float, str],
    styles: ArmStyles,
    size: Size,
) -> Figure:
    """Return a figure of high and low loss over a choice, whose values are named on the x axis.

    Points are filled on the lines and hollow beside them; `name` gives the label of each.
    """
    arms = lines.arms
    columns = legend_columns(arms, size)
    keys = [line_key(plot_label(arm), styles[arm][0], marker=styles[arm][1], ms=5) for arm in arms]
    with plot_style():
        figure, panels = panel_grid(size, GROUPS, 0.85 * size.height, legend_inches(arms, columns))
        for axes, group in zip(panels, ("high", "low"), strict=True):
            axes.set_ylabel("nats per token")
            axes.set_xlabel(title)
            shown = _apart(list(ticks), size)
            axes.set_xticks(shown, [plot_label(ticks[x]) for x in shown])
            values = {setting: getattr(each, group) for setting, each in losses.items()}
            _draw_lines(axes, lines, values, name, styles)
        legend_on_top(figure, keys, columns)
    return figure


def _apart(places: Sequence[float], size: Size) -> list[float]:
    """Return as many of the places as have room for a label, always the first and the last."""
    places = sorted(places)
    room = TICK_WIDTH * (places[-1] - places[0]) * (1.6 if size.narrow else 1.0)
    kept = places[:1]
    for x in places[1:-1]:
        if x - kept[-1] >= room and places[-1] - x >= room:
            kept.append(x)
    return kept + places[1:][-1:]


def _draw_lines(
    axes: Axes,
    lines: ChoiceLines,
    losses: Mapping[TriedSetting, Estimate],
    name: Callable[[TriedSetting], str],
    styles: ArmStyles,
) -> None:
    labels, paths = [], []

    def draw(points: Sequence[tuple[float, Point]], **look: Any) -> None:
        colour, marker = styles[points[0][1].setting.arm]
        xs = [x for x, _ in points]
        drawn = [losses[point.setting] for _, point in points]
        ys = [each.mean for each in drawn]
        axes.errorbar(
            xs, ys, yerr=[each.half_width or 0.0 for each in drawn],
            color=colour, marker=marker, ms=4.5, lw=1.4, elinewidth=1.0, capsize=2, **look,
        )  # fmt: skip
        labels.append(PointLabel(xs[-1], ys[-1], name(points[-1][1].setting), colour))
        paths.append(np.column_stack([xs, ys]))

    for line in lines.lines:
        draw(line.points)
    for each in lines.lone:
        draw([each], ls="none", mfc="none")
    axes.margins(x=0.14)
    axes.autoscale_view()
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + LABEL_ROOM * (right - left))
    left_out = label_points(axes, [label for label in labels if label.text], paths)
    note_on_panel(axes, left_out_note(left_out))


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
        axes.barh(row, value.mean, 0.86 * height, color=styles[arm][0], xerr=value.half_width)
        axes.annotate(
            f"{value.mean:.1f}", (value.mean + (value.half_width or 0.0), row), (4, 0),
            textcoords="offset points", va="center_baseline", fontsize=8.5,
        )  # fmt: skip
    axes.set_yticks(range(len(tasks)), [plot_label(task) for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(False, axis="y")
