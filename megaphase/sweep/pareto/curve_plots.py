"""Figures of a sweep with curves of runs, over steps and over tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from megaphase.report.plot_parts import (
    BOTTOM_INCHES,
    LEFT_INCHES,
    TITLE_INCHES,
    Curve,
    PointLabel,
    cropped_note,
    label_points,
    left_out_note,
    legend_columns,
    legend_inches,
    legend_on_top,
    line_key,
    loss_limits,
    note_on_panel,
    panel_grid,
    step_axes,
    without_beginning,
)
from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.pareto.arm_styles import ArmStyles
from megaphase.sweep.pareto.curves import RunCurves, mean_curve
from megaphase.sweep.pareto.points import Point
from megaphase.utils.plot_style import (
    DASHED,
    INK,
    MUTED,
    SETTING_LIMIT,
    Size,
    inch_axes,
    new_figure,
    plot_label,
    plot_style,
    short_number,
)

Curves = Mapping[str, RunCurves]
Name = Callable[[TriedSetting], str]
PANEL_HEIGHT = 0.62  # of a figure's
MOST_SWITCHES = 4  # that are marked by a line over the whole height


@dataclass(frozen=True)
class TokenLine:
    """A setting's curves over the tokens seen of the tasks of a group, at its validations.

    Attributes:
        steps, tokens, epochs: of all tasks of the group together, [n] each; epochs of their text.
        validation, training: mean losses over the tasks, [n] each; training is NaN where none of
            them was trained on since the previous validation.
    """

    point: Point
    steps: np.ndarray
    tokens: np.ndarray
    epochs: np.ndarray
    validation: np.ndarray
    training: np.ndarray


def token_line(
    point: Point, curves: Curves, tasks: Sequence[str], sizes: Mapping[str, int]
) -> TokenLine:
    """Return a setting's curves from the first token on; `sizes`: tokens of their text by task."""
    steps, tokens = mean_curve(curves, point, tasks, lambda run: run.tokens)
    _, validation = _validation(curves, point, tasks)
    _, training = mean_curve(curves, point, tasks, lambda run: run.training)
    # Tokens over the text's would count the padding of packed samples as text.
    of_tasks = [mean_curve(curves, point, [task], lambda run: run.epochs)[1] for task in tasks]
    epochs = np.average(of_tasks, axis=0, weights=[sizes[task] for task in tasks])
    seen = tokens > 0
    total = len(tasks) * tokens[seen]
    return TokenLine(point, steps[seen], total, epochs[seen], validation[seen], training[seen])


def task_curves_plot(
    best: Sequence[Point],
    curves: Curves,
    tasks: Sequence[str],
    names: Sequence[str],
    styles: ArmStyles,
    size: Size,
) -> Figure:
    """Return a figure of validation loss over steps, with a panel per task and a line per point.

    names: of the points in the legend. Every switch is marked on its line, and by a dashed line if
    there are few.
    """
    keys = [
        line_key(plot_label(name, SETTING_LIMIT), styles[point.setting.arm][0], lw=1.8)
        for name, point in zip(names, best, strict=True)
    ]
    columns = legend_columns(names, size)
    span = _span(best, curves)
    switches = {step for point in best for step in _switches(point, curves)}
    with plot_style():
        figure, panels = panel_grid(
            size, tasks, PANEL_HEIGHT * size.height, legend_inches(names, columns)
        )
        for task, axes in zip(tasks, panels, strict=True):
            step_axes(axes, span, size, ticks=5)
            axes.set_ylabel("nats per token")
            for step in sorted(switches) if len(switches) <= MOST_SWITCHES else ():
                axes.axvline(step, color=MUTED, lw=0.9, ls=DASHED, zorder=1)
            drawn = [_validation(curves, point, [task]) for point in best]
            for point, (steps, losses) in zip(best, drawn, strict=True):
                at = np.flatnonzero(np.isin(steps, _switches(point, curves)))
                axes.plot(
                    steps, losses, color=styles[point.setting.arm][0], lw=1.6,
                    marker="o", ms=5, markevery=[int(i) for i in at],
                )  # fmt: skip
            later = [without_beginning(each, span, switches) for each in drawn]
            trained = [
                _while_trained(curves, point, task, each)
                for point, each in zip(best, later, strict=True)
            ]
            axes.set_ylim(loss_limits(trained, later))
            note_on_panel(axes, cropped_note(axes, drawn))
        legend_on_top(figure, keys, columns)
    return figure


def _while_trained(curves: Curves, point: Point, task: str, curve: Curve) -> Curve:
    """Return the part of a setting's curve after its first training text of a task."""
    (steps, losses), (at, tokens) = curve, mean_curve(curves, point, [task], lambda run: run.tokens)
    seen = np.isin(steps, at[tokens > 0])
    return steps[seen], losses[seen]


def overfitting_plot(
    points: Sequence[Point],
    curves: Curves,
    low: Sequence[str],
    titles: Sequence[str],
    styles: ArmStyles,
    size: Size,
) -> Figure:
    """Return a figure of training and validation loss of low-resource tasks, a panel per point.

    The lowest validation loss and its increase since then are marked. titles: of the panels.
    """
    keys = [line_key("validation", lw=1.8), line_key("training", lw=1.4, ls=DASHED)]
    span = _span(points, curves)
    drawn = [
        (
            _validation(curves, point, low),
            mean_curve(curves, point, low, lambda run: run.training),
        )
        for point in points
    ]
    limits = loss_limits(
        without_beginning(curve, span, _switches(point, curves))
        for point, pair in zip(points, drawn, strict=True)
        for curve in pair
    )
    with plot_style():
        figure, panels = panel_grid(
            size, titles, PANEL_HEIGHT * size.height, legend_inches([""], 1), SETTING_LIMIT
        )
        for axes, point, (validation, training) in zip(panels, points, drawn, strict=True):
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
            note_on_panel(axes, cropped_note(axes, (training, validation)))
            axes.annotate(
                f"lowest {losses[lowest]:.2f} {then}",
                (1.0, 1.0), xycoords="axes fraction", xytext=(-2, -2), textcoords="offset points",
                ha="right", va="top", fontsize=8.5, color=MUTED,
            )  # fmt: skip
        legend_on_top(figure, keys, len(keys))
    return figure


def token_plot(
    lines: Sequence[TokenLine],
    loss: Literal["validation", "training"],
    name: Name,
    styles: ArmStyles,
    size: Size,
) -> Figure:
    """Return a figure of low-resource loss over low-resource tokens seen, with a line per setting.

    name: gives the label at the end of a line.
    """
    with plot_style():
        figure, axes = _one_panel(lines, styles, size)
        axes.set_xscale("log")
        axes.set_xlabel("low-resource tokens seen")
        unit = "" if size.narrow else " (nats per token)"
        axes.set_ylabel(f"low-resource {loss} loss{unit}")
        ends = [value for line in lines for value in (*line.tokens[:1], *line.tokens[-1:])]
        is_wide = not size.narrow or max(ends, default=1) < 20 * min(ends, default=1)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_wide else (1.0,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        curves = [(line.tokens, getattr(line, loss)) for line in lines]
        _labelled_lines(axes, lines, curves, name, styles, ms=2.5)
    return figure


def convergence_plot(
    lines: Sequence[TokenLine], curves: Curves, name: Name, styles: ArmStyles, size: Size
) -> Figure:
    """Return a figure of the high-resource validation loss over the epochs of that text.

    The beginning of the last phase, where the pre-training ends, is marked on every line.
    """
    with plot_style():
        figure, axes = _one_panel(lines, styles, size)
        axes.set_xlabel("epochs of the high-resource text")
        axes.set_ylabel("high-resource loss (nats per token)")
        drawn = [(line.epochs, line.validation) for line in lines]
        _labelled_lines(axes, lines, drawn, name, styles, ms=6, curves=curves)
        axes.set_xlim(left=0)
    return figure


def _one_panel(
    lines: Sequence[TokenLine], styles: ArmStyles, size: Size
) -> tuple[Figure, Axes]:  # fmt: skip
    """Return a figure with a legend of the arms above its only axes."""
    arms = list(dict.fromkeys(line.point.setting.arm for line in lines))
    keys = [line_key(plot_label(arm), styles[arm][0], lw=1.8) for arm in arms]
    columns = legend_columns(arms, size)
    top = legend_inches(arms, columns) + TITLE_INCHES - 0.1
    figure = new_figure(size.width, size.height + top)
    right, height = size.width - 0.3, size.height - 0.1
    axes = inch_axes(figure, LEFT_INCHES, BOTTOM_INCHES, right, height)
    legend_on_top(figure, keys, columns)
    return figure, axes


def _labelled_lines(
    axes: Axes,
    lines: Sequence[TokenLine],
    drawn: Sequence[Curve],
    name: Name,
    styles: ArmStyles,
    ms: float,
    curves: Curves | None = None,
) -> None:
    """Draw lines with labels at their ends; with `curves`, only the last switch is marked."""
    labels = []
    for line, (xs, losses) in zip(lines, drawn, strict=True):
        colour, marked = styles[line.point.setting.arm][0], None
        if curves is not None:
            switches = _switches(line.point, curves)[-1:]
            marked = [int(i) for i in np.flatnonzero(np.isin(line.steps, switches))]
        axes.plot(xs, losses, color=colour, lw=1.5, marker="o", ms=ms, alpha=0.85, markevery=marked)
        ends = np.flatnonzero(np.isfinite(losses))
        if len(ends):
            end = float(xs[ends[-1]]), float(losses[ends[-1]])
            labels.append(PointLabel(*end, name(line.point.setting), colour))
    axes.set_ylim(_settled_limits(drawn))
    finite = [np.stack(each, axis=1)[np.isfinite(each[1])] for each in drawn]
    left_out = label_points(axes, labels, finite)
    note_on_panel(axes, cropped_note(axes, drawn), left_out_note(left_out))


def _switches(point: Point, curves: Curves) -> list[int]:
    """Return the steps done when each phase but the first began."""
    return list(curves[point.runs[0][0].name].switches)


def _settled_limits(lines: Sequence[Curve]) -> tuple[float, float]:
    """Return limits that show the later part of every line, and at least its end."""
    span = 0, max((len(losses) for _, losses in lines), default=0)
    later = [without_beginning((np.arange(len(losses)), losses), span) for _, losses in lines]
    finite = [
        (places[np.isfinite(losses)], losses[np.isfinite(losses)]) for places, losses in lines
    ]
    ends = [(places[-1:], losses[-1:]) for places, losses in finite]
    return loss_limits([*later, *ends])


def _validation(curves: Curves, point: Point, tasks: Sequence[str]) -> Curve:
    return mean_curve(curves, point, tasks, lambda run: run.validation)


def _span(points: Sequence[Point], curves: Curves) -> tuple[int, int]:
    return 0, max(curves[trial.name].steps[-1] for point in points for trial, _ in point.runs)
