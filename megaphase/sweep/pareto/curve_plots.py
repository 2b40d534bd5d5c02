"""Figures of a sweep with curves of runs, over steps and over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from megaphase.report.plot_parts import (
    BOTTOM_INCHES,
    LEFT_INCHES,
    Curve,
    PointLabel,
    label_points,
    legend_columns,
    legend_inches,
    legend_on_top,
    line_key,
    loss_limits,
    panel_grid,
    step_axes,
)
from megaphase.sweep.pareto.arm_styles import ArmStyles
from megaphase.sweep.pareto.curves import RunCurves, mean_curve
from megaphase.sweep.pareto.points import Point
from megaphase.utils.plot_style import (
    DASHED,
    INK,
    MUTED,
    Size,
    inch_axes,
    new_figure,
    plot_label,
    plot_style,
    short_number,
)

Curves = Mapping[str, RunCurves]
PANEL_HEIGHT = 0.62  # of a figure's


def task_curves_plot(
    best: Sequence[Point], curves: Curves, tasks: Sequence[str], styles: ArmStyles, size: Size
) -> Figure:
    """Return a figure of validation loss over steps, with a panel per task and a line per arm."""
    arms = [point.setting.arm for point in best]
    keys = [line_key(plot_label(arm), styles[arm][0], lw=1.8) for arm in arms]
    columns = legend_columns(arms, size)
    span = _span(best, curves)
    switches = sorted({_switch(point, curves) for point in best} - {0})
    with plot_style():
        figure, panels = panel_grid(
            size, tasks, PANEL_HEIGHT * size.height, legend_inches(arms, columns)
        )
        for task, axes in zip(tasks, panels, strict=True):
            step_axes(axes, span, size, ticks=5)
            axes.set_ylabel("nats per token")
            for step in switches:
                axes.axvline(step, color=MUTED, lw=0.9, ls=DASHED, zorder=1)
            drawn = [_validation(curves, point, [task]) for point in best]
            for point, (steps, losses) in zip(best, drawn, strict=True):
                at = [int(i) for i in np.flatnonzero(steps == _switch(point, curves))]
                axes.plot(
                    steps, losses, color=styles[point.setting.arm][0], lw=1.6,
                    marker="o", ms=5, markevery=at,
                )  # fmt: skip
            axes.set_ylim(loss_limits(drawn, span))
        legend_on_top(figure, keys, columns)
    return figure


def overfitting_plot(
    points: Sequence[Point], curves: Curves, low: Sequence[str], styles: ArmStyles, size: Size
) -> Figure:
    """Return a figure of training and validation loss of low-resource tasks, a panel per mixture.

    The lowest validation loss and its increase since then are marked.
    """
    several = len({point.setting.arm for point in points}) > 1
    titles = [
        f"{point.setting.arm} {point.setting.label}" if several else point.setting.label
        for point in points
    ]
    keys = [line_key("validation", lw=1.8), line_key("training", lw=1.4, ls=DASHED)]
    span = _span(points, curves)
    drawn = {
        title: (
            _validation(curves, point, low),
            mean_curve(curves, point, low, lambda run: run.training),
        )
        for title, point in zip(titles, points, strict=True)
    }
    limits = loss_limits([curve for pair in drawn.values() for curve in pair], span)
    with plot_style():
        figure, panels = panel_grid(
            size, titles, PANEL_HEIGHT * size.height, legend_inches([""], 1)
        )
        for axes, point, (validation, training) in zip(panels, points, drawn.values(), strict=True):
            colour = styles[point.setting.arm][0]
            step_axes(axes, span, size, ticks=5)
            axes.set_ylabel("nats per token")
            axes.set_ylim(limits)
            axes.plot(*training, color=colour, lw=1.4, ls=DASHED)
            axes.plot(*validation, color=colour, lw=1.8)
            steps, losses = validation
            lowest = int(np.nanargmin(losses))
            axes.plot(steps[lowest], losses[lowest], "o", ms=6, mfc="none", mec=INK)
            risen = float(losses[-1] - losses[lowest])
            then = f"at {steps[lowest]:,}, then +{risen:.2f}" if risen > 0 else "at the end"
            axes.annotate(
                f"lowest {losses[lowest]:.2f} {then}",
                (1.0, 1.0), xycoords="axes fraction", xytext=(-2, -2), textcoords="offset points",
                ha="right", va="top", fontsize=8.5, color=MUTED,
            )  # fmt: skip
        legend_on_top(figure, keys, len(keys))
    return figure


def data_efficiency_plot(
    points: Sequence[Point], curves: Curves, low: Sequence[str], styles: ArmStyles, size: Size
) -> Figure:
    """Return a figure of low-resource loss over low-resource tokens seen, with a line per point."""
    arms = list(dict.fromkeys(point.setting.arm for point in points))
    keys = [line_key(plot_label(arm), styles[arm][0], lw=1.8) for arm in arms]
    columns = legend_columns(arms, size)
    top = legend_inches(arms, columns)
    with plot_style():
        figure = new_figure(size.width, size.height + top)
        axes = inch_axes(figure, LEFT_INCHES, BOTTOM_INCHES, size.width - 0.3, size.height - 0.1)
        axes.set_xscale("log")
        axes.set_xlabel("low-resource tokens seen")
        axes.set_ylabel("low-resource loss (nats per token)")
        lines = [_over_tokens(curves, point, low) for point in points]
        labels = []
        for point, (tokens, losses) in zip(points, lines, strict=True):
            colour = styles[point.setting.arm][0]
            axes.plot(tokens, losses, color=colour, lw=1.5, marker="o", ms=2.5, alpha=0.85)
            if len(tokens):
                end = float(tokens[-1]), float(losses[-1])
                labels.append(PointLabel(*end, point.setting.mixture.label, colour))
        axes.set_ylim(_settled_limits(lines))
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if size.narrow else (1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        label_points(axes, labels, [np.stack(line, axis=1) for line in lines])
        legend_on_top(figure, keys, columns)
    return figure


def _switch(point: Point, curves: Curves) -> int:
    """Return the steps of the first stage; 0 without one."""
    return curves[point.runs[0][0].name].switch or 0


def _settled_limits(lines: Sequence[Curve]) -> tuple[float, float]:
    """Return limits that show the later part of every line."""
    return loss_limits(
        ((np.arange(len(losses)), losses) for _, losses in lines),
        (0, max((len(losses) for _, losses in lines), default=0)),
    )


def _over_tokens(curves: Curves, point: Point, low: Sequence[str]) -> Curve:
    """Return the tokens of the low-resource tasks together, where there are any, and their loss."""
    _, tokens = mean_curve(curves, point, low, lambda run: run.tokens)
    _, losses = _validation(curves, point, low)
    seen = tokens > 0
    return len(low) * tokens[seen], losses[seen]


def _validation(curves: Curves, point: Point, tasks: Sequence[str]) -> Curve:
    return mean_curve(curves, point, tasks, lambda run: run.validation)


def _span(points: Sequence[Point], curves: Curves) -> tuple[int, int]:
    return 0, max(curves[trial.name].steps[-1] for point in points for trial, _ in point.runs)
