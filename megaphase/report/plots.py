"""The figures of a report, one function each.

Every function returns a matplotlib `Figure`. `colours` maps tasks to colours and is shared by all
figures of a report; low-resource tasks are drawn with thicker lines and markers. Losses are in nats
per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megaphase.plan.plan import REPEATED_TOO_OFTEN
from megaphase.report.differences import tokenizers_differ
from megaphase.report.incidents import divergences, loss_spikes, skipped_spikes, skipped_steps
from megaphase.report.plot_parts import (
    BOTTOM_INCHES,
    LEGEND_LINE_INCHES,
    Curve,
    legend_on_top,
    line_key,
    loss_limits,
    panel_grid,
    step_axes,
    thinned,
    without_beginning,
)
from megaphase.report.runs import PhasePlan, RunRecord, TaskShare
from megaphase.utils.plot_style import (
    DASHED,
    DOTTED,
    INK,
    LABEL_GAP_POINTS,
    MUTED,
    PAPER,
    Size,
    inch_axes,
    label_line_ends,
    label_width,
    line_colours,
    new_figure,
    plot_label,
    plot_style,
    short_number,
)

LEGEND_COLUMNS = 3
TRAINING_POINTS = 300  # more would only add noise and make the page larger
Colours = Mapping[str, str]


def loss_plot(run: RunRecord, colours: Colours, size: Size) -> Figure:
    """Plot validation loss per task over steps, with training loss per task as a faint line."""
    curves = {task: _validation_curve(run, task) for task in validated_tasks([run])}
    training = {task: _training_curve(run, task) for task in curves}
    averages = {task: _average_curves(run, task) for task in curves}
    keys = [line_key("training loss", lw=1.0, alpha=0.5), *_incident_keys(run)]
    if run.low_resource_tasks:
        low, high = run.groups
        keys.insert(0, line_key(low, **_line_style(True)))
        keys.insert(1, line_key(high, **_line_style(False)))
    if any(averages.values()):
        keys.append(line_key("average of the weights", lw=1.4, ls=DOTTED))
    height = max(size.height, 1.3 + len(curves) * LABEL_GAP_POINTS / 72)
    with plot_style():
        figure = new_figure(size.width, height)
        right = size.width - label_width(curves)
        rows = -(-len(keys) // LEGEND_COLUMNS)
        top = height - rows * LEGEND_LINE_INCHES - step_label_inches(run)
        axes = inch_axes(figure, 0.62, BOTTOM_INCHES, right, top)
        step_axes(axes, steps_of([run]), size)
        axes.set_ylabel("loss (nats per token)")
        for task, (steps, losses) in curves.items():
            look = _line_style(task in run.low_resource_tasks)
            axes.plot(steps, losses, color=colours[task], zorder=3, **look)
            axes.plot(*training[task], color=colours[task], alpha=0.3, linewidth=1.0)
            for curve in averages[task]:
                axes.plot(*curve, color=colours[task], lw=1.4, ls=DOTTED, marker=".", zorder=3)
        shown = [(run, curve) for task in curves for curve in _held_out_curves(run, task)]
        axes.set_ylim(loss_limits(_settled(shown, steps_of([run])), training.values()))
        label_line_ends(axes, _line_ends(curves, colours))
        mark_gaps(axes, run)
        mark_steps(axes, run)
        _mark_incidents(axes, run)
        legend_on_top(figure, keys, columns=LEGEND_COLUMNS)
    return figure


def learning_rate_plot(run: RunRecord, size: Size) -> Figure:
    """Plot the learning rate over steps."""
    height = 0.72 * size.height
    with plot_style():
        figure = new_figure(size.width, height)
        top = height - step_label_inches(run)
        axes = inch_axes(figure, 0.75, BOTTOM_INCHES, size.width - 0.25, top)
        step_axes(axes, steps_of([run]), size)
        axes.set_ylabel("learning rate")
        # One line per phase: the schedule restarts at a switch, so the lines must not be connected.
        for phase in run.plan.phases:
            rows = run.training.are_of(phase.name)
            curve = run.training.step[rows], run.training.learning_rate[rows]
            axes.plot(*thinned(curve), color=INK, lw=1.5)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        mark_gaps(axes, run)
        mark_steps(axes, run)
    return figure


def rates_plot(run: RunRecord, colours: Colours, size: Size) -> Figure:
    """Plot the planned sampling rate of every task over the steps of all phases."""
    height = 0.85 * size.height
    shown = [t for t in run.tasks if any(p.tasks[t].rate for p in run.plan.phases if t in p.tasks)]
    with plot_style():
        figure = new_figure(size.width, height)
        right = size.width - label_width(shown)
        top = height - step_label_inches(run)
        axes = inch_axes(figure, 0.62, BOTTOM_INCHES, right, top)
        step_axes(axes, (run.origin.step, run.planned_steps), size)
        axes.set_ylabel("sampling rate")
        ends: dict[str, float] = {}
        before = run.origin.step
        for phase in run.plan.phases:
            for task in shown:
                edges, rates = _planned_rates(phase, task)
                ends[task] = float(rates[-1])
                if any(rates):
                    look = _line_style(task in run.low_resource_tasks) | {"marker": None}
                    axes.plot(before + edges, rates, color=colours[task], **look)
            before += phase.steps
        axes.set_ylim(bottom=0)
        label_line_ends(axes, [(task, rate, colours[task]) for task, rate in ends.items()])
        mark_steps(axes, run)
    return figure


def _planned_rates(phase: PhasePlan, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps of a phase, from its first to its last one, and a task's rates there."""
    curve = phase.rates_over_steps
    if curve is None or task not in curve.rates or phase.steps == 0:
        rate = phase.tasks[task].rate if task in phase.tasks else 0.0
        return np.array([0, phase.steps]), np.array([rate, rate])
    edges, rates = np.array(curve.steps), np.array(curve.rates[task])
    middles = (edges[:-1] + edges[1:]) / 2
    return (
        np.array([edges[0], *middles, edges[-1]]),
        np.array([rates[0], *rates, rates[-1]]),
    )


def data_plot(run: RunRecord, colours: Colours, size: Size) -> Figure:
    """Plot planned training tokens and epochs per task, as bars with a segment per phase."""
    left, gap, right, top = 0.1 + label_width(run.tasks), 0.75, 0.6, 0.4
    bars = 0.28 * len(run.tasks)
    panel = bars + BOTTOM_INCHES
    with plot_style():
        if size.narrow:
            figure = new_figure(size.width, 2 * panel + 0.15 + top)
            edge = size.width - right
            tokens = inch_axes(figure, left, panel + 0.15 + BOTTOM_INCHES, edge, 2 * panel + 0.15)
            epochs = inch_axes(figure, left, BOTTOM_INCHES, edge, panel)
        else:
            figure = new_figure(size.width, panel + top)
            half = (size.width - left - gap - right) / 2
            tokens = inch_axes(figure, left, BOTTOM_INCHES, left + half, panel)
            epochs = inch_axes(figure, left + half + gap, BOTTOM_INCHES, size.width - right, panel)
        keys = _phase_bars(tokens, run, colours, "training tokens", lambda share: share.tokens)
        _phase_bars(epochs, run, colours, "epochs", lambda share: share.epochs)
        if epochs.get_xlim()[1] > REPEATED_TOO_OFTEN:
            epochs.axvline(REPEATED_TOO_OFTEN, color=INK, linewidth=0.9, linestyle=DASHED)
        if not size.narrow:
            epochs.tick_params(labelleft=False)
        legend_on_top(figure, keys, columns=len(keys))
    return figure


def comparison_plot(runs: Sequence[RunRecord], size: Size) -> Figure:
    """Plot validation loss over steps, with a panel per task and a line per run; in bits per byte
    if the runs have different tokenizers."""
    tasks = validated_tasks(runs)
    colours = line_colours(run.name for run in runs)
    keys = [line_key(plot_label(run.name), color=colours[run.name], lw=1.8) for run in runs]
    columns = 2 if size.narrow else 4
    top = 0.2 + LEGEND_LINE_INCHES * -(-len(runs) // columns)
    span = steps_of(runs)
    with plot_style():
        figure, panels = panel_grid(size, tasks, 0.55 * size.height, top)
        for task, axes in zip(tasks, panels, strict=True):
            step_axes(axes, span, size, ticks=5)
            axes.set_ylabel("bits per byte" if tokenizers_differ(runs) else "nats per token")
            curves = _comparison_curves(runs, task)
            for run, (steps, losses) in curves:
                axes.plot(steps, losses, color=colours[run.name], lw=1.8, marker="o", markersize=3)
            axes.set_ylim(loss_limits(_settled(curves, span)))
        legend_on_top(figure, keys, columns)
    return figure


def validated_tasks(runs: Sequence[RunRecord]) -> list[str]:
    """Return the tasks of these runs for which a validation loss has been measured."""
    measured = {task for run in runs for row in run.validation for task in row.validation}
    return list(dict.fromkeys(task for run in runs for task in run.tasks if task in measured))


def _validation_curve(run: RunRecord, task: str, in_bits: bool = False) -> Curve:
    rows = [row for row in run.validation if task in row.validation]
    steps = np.array([row.step for row in rows], dtype=np.int64)
    found = [row.validation[task] for row in rows]
    losses = [each.bits_per_byte if in_bits else each.loss for each in found]
    return steps, np.array(losses, dtype=np.float64)


def _average_curves(run: RunRecord, task: str) -> list[Curve]:
    """Return the validation losses of the average of the weights, a curve for each phase."""
    found = []
    for phase in run.plan.phases:
        rows = [row for row in run.validation_in(phase.name) if task in row.validation_average]
        steps = np.array([row.step for row in rows], dtype=np.int64)
        losses = [row.validation_average[task].loss for row in rows]
        found.append((steps, np.array(losses, dtype=np.float64)))
    return [curve for curve in found if len(curve[0])]


def _settled(curves: Iterable[tuple[RunRecord, Curve]], span: tuple[int, int]) -> list[Curve]:
    """Return the parts of curves that figures show whole.

    Only the steep beginning of a run with new weights may be cut off, before its first switch.
    """
    found = []
    for run, curve in curves:
        starts = [step for step, _ in run.switches]
        starts += [run.origin.step] if run.origin.step or run.origin.source else []
        found.append(without_beginning(curve, span, starts))
    return found


def _held_out_curves(run: RunRecord, task: str) -> list[Curve]:
    return [_validation_curve(run, task), *_average_curves(run, task)]


def loss_is_cut_off(run: RunRecord) -> bool:
    """Return whether the figure of the run's losses leaves out the steep beginning."""
    curves = [
        (run, each) for task in validated_tasks([run]) for each in _held_out_curves(run, task)
    ]
    return _any_is_cut_off(curves, steps_of([run]))


def _comparison_curves(runs: Sequence[RunRecord], task: str) -> list[tuple[RunRecord, Curve]]:
    in_bits = tokenizers_differ(runs)
    return [(run, _validation_curve(run, task, in_bits)) for run in runs]


def comparison_is_cut_off(runs: Sequence[RunRecord]) -> bool:
    """Return whether a panel of the comparison leaves out the steep beginning of a run."""
    return any(
        _any_is_cut_off(_comparison_curves(runs, task), steps_of(runs))
        for task in validated_tasks(runs)
    )


def _any_is_cut_off(curves: Sequence[tuple[RunRecord, Curve]], span: tuple[int, int]) -> bool:
    _, top = loss_limits(_settled(curves, span))
    return any(np.any(losses > top) for _, (_, losses) in curves)


def _line_ends(curves: Mapping[str, Curve], colours: Colours) -> list[tuple[str, float, str]]:
    """Return (task, newest finite loss, colour) of every curve that has one."""
    finite = {task: losses[np.isfinite(losses)] for task, (_, losses) in curves.items()}
    return [(task, float(v[-1]), colours[task]) for task, v in finite.items() if len(v)]


def _training_curve(run: RunRecord, task: str) -> Curve:
    """Return the task's training loss, averaged over equal ranges of steps without gaps."""
    rows, losses = run.training.of_task(task)
    steps = run.training.step[rows]
    width = max(1.0, (run.last_step - run.origin.step) / TRAINING_POINTS)
    _, stretch, counts = np.unique((steps - 1) // width, return_inverse=True, return_counts=True)
    return (
        np.bincount(stretch, weights=steps) / counts,
        np.bincount(stretch, weights=losses) / counts,
    )


def steps_of(runs: Sequence[RunRecord]) -> tuple[int, int]:
    """Return the steps before the first and at the last step of these runs; branches start late."""
    return min(run.origin.step for run in runs), max(run.last_step for run in runs)


def _line_style(low_resource: bool) -> dict[str, Any]:
    if low_resource:
        return {"linewidth": 2.0, "marker": "o", "markersize": 4.0}
    return {"linewidth": 1.3}


def _step_marks(run: RunRecord) -> list[tuple[int, str, Any]]:
    """Return (step, label, line style) of every switch and divergence, in the order of steps."""
    marks: list[tuple[int, str, Any]] = [(step, name, DASHED) for step, name in run.switches]
    marks += [(event.step, "diverges", "solid") for event in divergences(run)[:1]]
    return sorted(marks, key=lambda mark: mark[0])


def mark_gaps(axes: Axes, run: RunRecord) -> None:
    """Hatch ranges without metrics; a line across them connects the measurements around them."""
    for first, last in run.missing_steps:
        axes.axvspan(
            first - 1, last, facecolor="none", edgecolor=INK, alpha=0.25, hatch="///", lw=0
        )


def step_label_inches(run: RunRecord) -> float:
    return 0.15 + len(_step_marks(run)) * LABEL_GAP_POINTS / 72


def mark_steps(axes: Axes, run: RunRecord) -> None:
    """Draw a line at every switch and at the first divergence, with its name above it."""
    for above, (step, label, style) in enumerate(reversed(_step_marks(run))):
        left, right = axes.get_xlim()
        late = step > left + 0.75 * (right - left)
        axes.axvline(step, color=INK, linewidth=1.0, linestyle=style, zorder=1)
        axes.annotate(
            f"{plot_label(label)} →" if late else f"→ {plot_label(label)}",
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            # Every label has its own line, because the steps may be close to each other.
            xytext=(0, 3 + above * LABEL_GAP_POINTS),
            textcoords="offset points",
            ha="right" if late else "left",
        )


def _incident_marks(run: RunRecord) -> list[tuple[str, list[int], str]]:
    """Return (name, steps, marker) of incidents in single steps."""
    marks = [
        ("loss spike", loss_spikes(run), "^"),
        ("skipped step", sorted(skipped_steps(run) + skipped_spikes(run)), "x"),
    ]
    return [(name, steps, marker) for name, steps, marker in marks if steps]


def _incident_keys(run: RunRecord) -> list[Line2D]:
    return [
        line_key(name, color=INK, marker=marker, markersize=4, linestyle="none")
        for name, _, marker in _incident_marks(run)
    ]


def _mark_incidents(axes: Axes, run: RunRecord) -> None:
    """Draw the marks at the bottom."""
    for _, steps, marker in _incident_marks(run):
        axes.plot(
            steps,
            [0.02] * len(steps),
            transform=axes.get_xaxis_transform(),
            color=INK,
            marker=marker,
            markersize=4,
            linestyle="none",
            zorder=4,
        )


def _phase_bars(
    axes: Axes,
    run: RunRecord,
    colours: Colours,
    title: str,
    measure: Callable[[TaskShare], float],
) -> list[Patch]:
    """Draw a bar per task with its total at the end; return the legend's keys of the phases."""
    phases, tasks = run.plan.phases, run.tasks
    strengths = np.linspace(1.0, 0.4, len(phases))[::-1]  # the last phase is the strongest
    ends = np.zeros(len(tasks))
    for phase, strength in zip(phases, strengths, strict=True):
        values = [measure(phase.tasks[t]) if t in phase.tasks else 0.0 for t in tasks]
        fill = [colours[task] for task in tasks]
        axes.barh(range(len(tasks)), values, 0.62, left=ends, color=fill, alpha=float(strength))
        ends += values
    for row, end in enumerate(ends):
        axes.annotate(
            short_number(end),
            (end, row),
            (4, 0),
            textcoords="offset points",
            va="center_baseline",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},  # over the limit's line
        )
    axes.set_yticks(range(len(tasks)), [plot_label(task) for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(0, max(float(ends.max()), 1e-9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(False, axis="y")
    axes.set_xlabel(title)
    return [
        Patch(color=MUTED, alpha=float(strength), label=plot_label(phase.name))
        for phase, strength in zip(phases, strengths, strict=True)
    ]
