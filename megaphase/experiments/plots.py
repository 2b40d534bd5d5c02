"""The figures of a report, one function each.

Every function returns a matplotlib `Figure` of the given size. `colours` maps tasks to colours and
is shared by all figures of a report; low-resource tasks are drawn heavier, with markers. Losses
are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megaphase.experiments.losses import final_losses, ordered_tasks
from megaphase.experiments.plot_style import (
    INK,
    MUTED,
    WIDE,
    Size,
    inch_axes,
    label_line_ends,
    label_margin,
    labels_fit,
    new_figure,
    plot_style,
    shown,
)
from megaphase.experiments.runs import RunRecord, TaskShare

TRAINING_POINTS = 300  # more would only be noise, and weight in the page
REPETITION_LIMIT_EPOCHS = 4.0
DASHED = (0, (3, 2))
Colours = Mapping[str, str]
Curve = tuple[np.ndarray, np.ndarray]  # steps [n], losses [n]


def validation_loss_plot(run: RunRecord, colours: Colours, size: Size = WIDE) -> Figure:
    """Validation loss per task over steps, training loss per task as a faint line behind it."""
    tasks = _validated(run)
    with plot_style():
        figure = new_figure(size.width, size.height)
        axes = _step_axes(figure, run, size, tasks, "loss (nats per token)")
        curves = {task: _validation_curve(run, task) for task in tasks}
        for task in tasks:
            steps, losses = _training_curve(run, task)
            axes.plot(steps, losses, color=colours[task], alpha=0.28, linewidth=0.9, zorder=1.5)
        _draw_tasks(axes, run, curves, colours)
        axes.set_ylim(*_loss_limits(list(curves.values())))
        _label_tasks(axes, run, curves, colours, size)
        _mark_switches(axes, run)
    return figure


def change_since_switch_plot(run: RunRecord, colours: Colours, size: Size = WIDE) -> Figure:
    """How far each task's validation loss has moved since the first switch; below 0 is better."""
    switch = run.switch_steps[0][0]
    phases = {phase.name for phase in run.plan.phases[1:]}
    curves: dict[str, Curve] = {}
    for task in _validated(run):
        rows = [r for r in run.validation if r.phase in phases and task in r.loss]
        if rows:
            steps = np.array([row.step - switch for row in rows])
            losses = np.array([row.loss[task] for row in rows])
            curves[task] = (steps, losses - losses[0])
    with plot_style():
        figure = new_figure(size.width, size.height)
        axes = _step_axes(figure, run, size, list(curves), "change of loss (nats per token)")
        axes.set_xlabel("steps since the switch")
        axes.set_xlim(0, max((float(steps[-1]) for steps, _ in curves.values()), default=1) or 1)
        axes.axhline(0, color=INK, linewidth=0.9)
        _draw_tasks(axes, run, curves, colours)
        axes.margins(y=0.08)
        axes.autoscale_view(scalex=False)
        _label_tasks(axes, run, curves, colours, size)
    return figure


def learning_rate_plot(run: RunRecord, size: Size = WIDE) -> Figure:
    """Learning rate over steps."""
    with plot_style():
        figure = new_figure(size.width, size.height * 0.72)
        axes = _step_axes(figure, run, size, [], "learning rate")
        # One line per phase: at the switch the schedule starts anew and must not be joined up.
        for phase in run.phases_begun:
            rows = [row for row in run.training if row.phase == phase.name]
            axes.plot([r.step for r in rows], [r.learning_rate for r in rows], color=INK, lw=1.5)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        _mark_switches(axes, run)
    return figure


def tokens_plot(run: RunRecord, colours: Colours, size: Size = WIDE) -> Figure:
    """Planned training tokens per task and phase, as stacked bars."""
    return _phase_bars(run, colours, size, "training tokens", lambda share: share.tokens, _count)


def epochs_plot(run: RunRecord, colours: Colours, size: Size = WIDE) -> Figure:
    """Planned epochs per task and phase, as stacked bars, with the limit of useful repetition."""
    figure = _phase_bars(run, colours, size, "epochs", lambda share: share.epochs, "{:.2g}".format)
    axes = figure.axes[0]
    if axes.get_xlim()[1] > REPETITION_LIMIT_EPOCHS:
        axes.axvline(REPETITION_LIMIT_EPOCHS, color=INK, lw=0.9, ls=DASHED)
    return figure


def final_losses_plot(runs: Sequence[RunRecord], colours: Colours, size: Size = WIDE) -> Figure:
    """The newest validation loss of each task in each run: one panel per task, one row per run."""
    tasks = list(dict.fromkeys(task for run in runs for task in _validated(run)))
    names = [shown(run.name) for run in runs]
    columns = 1 if size.narrow else min(2, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    panel_height = 0.62 + 0.24 * len(runs)
    with plot_style():
        figure = new_figure(size.width, lines * panel_height + 0.35)
        grid = figure.subplots(lines, columns, squeeze=False)
        for panel, axes in enumerate(grid.flat):
            if panel >= len(tasks):
                axes.set_visible(False)
                continue
            _final_panel(axes, runs, tasks[panel], colours[tasks[panel]])
            axes.set_yticks(range(len(runs)), names if panel % columns == 0 else [""] * len(names))
            if panel + columns >= len(tasks):
                axes.set_xlabel("loss (nats per token)")
        figure.subplots_adjust(
            left=label_margin(names) / size.width,
            right=1 - 0.2 / size.width,
            top=1 - 0.3 / figure.get_size_inches()[1],
            bottom=0.5 / figure.get_size_inches()[1],
            hspace=1.9 / (1 + len(runs)) + 0.25,
            wspace=0.12,
        )
    return figure


def _final_panel(axes: Axes, runs: Sequence[RunRecord], task: str, colour: str) -> None:
    ends = [_newest(run, task) for run in runs]
    finite = [end for end in ends if math.isfinite(end)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    room = max(high - low, 0.02)
    axes.set_xlim(low - 0.12 * room, high + 0.4 * room)  # room for the number beside the dot
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_title(shown(task), loc="left", color=colour, fontweight="bold", pad=4)
    for row, end in enumerate(ends):
        if math.isfinite(end):
            axes.plot([end], [row], "o", color=colour, markersize=5.5)
            axes.annotate(f"{end:.3f}", (end, row), (6, 0), textcoords="offset points", va="center")


def _newest(run: RunRecord, task: str) -> float:
    ends = [loss.end for loss in final_losses(run) if loss.task == task]
    return ends[-1] if ends else math.nan


def _validated(run: RunRecord) -> list[str]:
    measured = {task for row in run.validation for task in row.loss}
    return [task for task in run.tasks if task in measured]


def _validation_curve(run: RunRecord, task: str) -> Curve:
    rows = [row for row in run.validation if task in row.loss]
    return np.array([r.step for r in rows]), np.array([r.loss[task] for r in rows])


def _training_curve(run: RunRecord, task: str) -> Curve:
    """The task's training loss, averaged over equal stretches of steps; NaN where it is absent."""
    rows = [row for row in run.training if task in row.loss_by_task]
    if not rows:
        return np.empty(0), np.empty(0)
    steps = np.array([row.step for row in rows])
    losses = np.array([row.loss_by_task[task] for row in rows])
    edges = np.linspace(0, run.last_step, min(TRAINING_POINTS, run.last_step) + 1)
    bins = np.clip(np.searchsorted(edges, steps) - 1, 0, len(edges) - 2)
    counts = np.bincount(bins, minlength=len(edges) - 1)
    sums = np.bincount(bins, weights=losses, minlength=len(edges) - 1)
    filled = np.flatnonzero(counts)
    return (edges[filled] + edges[filled + 1]) / 2, sums[filled] / counts[filled]


def _loss_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Limits that show where the curves differ: what was measured before any step is left out."""
    trained = [losses[steps > 0] if (steps > 0).any() else losses for steps, losses in curves]
    values = np.concatenate(trained) if trained else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    room = max(high - low, 0.1)
    return low - 0.08 * room, high + 0.1 * room


def _step_axes(
    figure: Figure, run: RunRecord, size: Size, labelled: Sequence[str], what: str
) -> Axes:
    beside = labels_fit(len(labelled), size)
    right = max(0.25, label_margin(labelled) if labelled and beside else 0.0)
    axes = inch_axes(figure, left=0.52, right=right, top=0.62 if labelled else 0.42)
    axes.set_xlim(0, max(run.last_step, 1))
    axes.set_xlabel("step")
    axes.set_title(what, loc="left", pad=20 if labelled else 14, color=MUTED)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5 if size.narrow else 9, integer=True))
    axes.grid(False, axis="x")
    return axes


def _draw_tasks(axes: Axes, run: RunRecord, curves: dict[str, Curve], colours: Colours) -> None:
    low = run.low_resource_tasks
    for task, (steps, losses) in curves.items():
        axes.plot(
            steps,
            losses,
            color=colours[task],
            linewidth=2.0 if task in low else 1.3,
            marker="o" if task in low else None,
            markersize=3.6,
            zorder=3 if task in low else 2,
        )


def _label_tasks(
    axes: Axes, run: RunRecord, curves: dict[str, Curve], colours: Colours, size: Size
) -> None:
    ends = [
        (task, float(losses[-1]), colours[task])
        for task, (_, losses) in curves.items()
        if len(losses) and math.isfinite(losses[-1])
    ]
    beside = labels_fit(len(ends), size)
    if beside:
        label_line_ends(axes, ends)
    handles = [] if beside else [
        Line2D([], [], color=colour, lw=2, label=shown(task)) for task, _, colour in ends
    ]  # fmt: skip
    if run.low_resource_tasks:
        handles.append(Line2D([], [], color=MUTED, lw=2, marker="o", ms=3.6, label="low-resource"))
        handles.append(Line2D([], [], color=MUTED, lw=1.3, label="high-resource"))
    if axes.get_xlabel() == "step":
        handles.append(Line2D([], [], color=MUTED, lw=0.9, alpha=0.45, label="training loss"))
    _legend_above(axes, handles, columns=3 if size.narrow else 6)


def _legend_above(axes: Axes, handles: Sequence[Line2D | Patch], columns: int) -> None:
    axes.legend(
        handles=list(handles),
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=columns,
        fontsize=8,
        handlelength=1.4,
        columnspacing=1.0,
        handletextpad=0.5,
        borderaxespad=0.0,
    )


def _mark_switches(axes: Axes, run: RunRecord) -> None:
    for step, phase in run.switch_steps:
        axes.axvline(step, color=INK, linewidth=0.9, linestyle=DASHED, zorder=1)
        late = step > 0.75 * axes.get_xlim()[1]
        axes.annotate(
            shown(phase),
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if late else 4, -2),
            textcoords="offset points",
            ha="right" if late else "left",
            va="top",
            fontsize=8,
            color=INK,
        )


def _phase_bars(
    run: RunRecord,
    colours: Colours,
    size: Size,
    label: str,
    measure: Callable[[TaskShare], float],
    write: Callable[[float], str],
) -> Figure:
    """Bars of one measure per task, a segment per phase, the total written at the end."""
    tasks = ordered_tasks(run)
    phases = run.plan.phases
    strengths = [1.0] if len(phases) == 1 else np.linspace(0.42, 1.0, len(phases)).tolist()
    with plot_style():
        figure = new_figure(size.width, 0.95 + 0.28 * len(tasks))
        axes = inch_axes(figure, left=label_margin(tasks), right=0.6, top=0.42)
        ends = np.zeros(len(tasks))
        for phase, strength in zip(phases, strengths, strict=True):
            shares = [phase.tasks.get(task) for task in tasks]
            values = np.array([0.0 if share is None else measure(share) for share in shares])
            fill = [colours[task] for task in tasks]
            axes.barh(range(len(tasks)), values, 0.62, ends, color=fill, alpha=strength)
            ends += values
        for row, end in enumerate(ends):
            axes.annotate(write(end), (end, row), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(tasks)), [shown(task) for task in tasks])
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.set_xlim(0, max(float(ends.max(initial=0)), 1e-9) * 1.02)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
        axes.xaxis.set_major_locator(MaxNLocator(4 if size.narrow else 7))
        axes.grid(False, axis="y")
        axes.set_xlabel(label)
        keys = [
            Patch(color=MUTED, alpha=strength, label=shown(phase.name))
            for phase, strength in zip(phases, strengths, strict=True)
        ]
        _legend_above(axes, keys, columns=4)
    return figure


def _count(value: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}".replace("e-0", "e-")
