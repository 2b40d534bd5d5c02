"""One picture of a whole run, from its plan: what changes over its steps."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megaphase.config.run import RunConfig
from megaphase.optim.schedules import batch_scale, learning_rate
from megaphase.plan.plan import Plan
from megaphase.utils.errors import InputError
from megaphase.utils.files import temporary_path
from megaphase.utils.plot_style import (
    INK,
    LABEL_GAP_POINTS,
    LINE_COLOURS,
    MUTED,
    inch_axes,
    label_width,
    new_figure,
    plot_label,
    plot_style,
    short_number,
)

SUFFIXES = (".png", ".svg", ".pdf")

# Steps at which a phase is drawn; more would not be visible.
POINTS_PER_PHASE = 400

WIDTH = 9.4
LEFT_INCHES, BOTTOM_INCHES, GAP_INCHES = 0.85, 0.52, 0.34
# Phases whose names are written above the picture; of more, every so many.
MOST_COLOURED_TASKS = 8
MOST_PHASE_NAMES = 12
NAME_CHARACTER_INCHES = 0.085
OTHERS_COLOUR = "#b9bec6"


class Panel(NamedTuple):
    """A panel: its title and the height of its axes in inches."""

    title: str
    height: float


RATES, EPOCHS, TOKENS, RATE, BATCH, LENGTH, PER_STEP = PANELS = (
    Panel("sampling rates", 1.7),
    Panel("epochs of each task", 1.5),
    Panel("tokens of each task", 1.5),
    Panel("learning rate", 0.8),
    Panel("batch (samples)", 0.6),
    Panel("seq_len", 0.6),
    Panel("tokens per step", 0.6),
)


@dataclass(frozen=True)
class RunCurves:
    """What changes over the steps of a run; arrays have a value for each point.

    steps:         float64 [points], steps done at each point, over the whole run
    phase_ends:    int [phases], the points after the last one of each phase
    rates:         float64 [points, tasks], effective rates of the step that ends there
    epochs:        float64 [points, tasks], so far
    tokens:        float64 [points, tasks], so far
    learning_rate: float64 [points], of the step that ends there
    batch:         float64 [points], samples of the step that ends there
    seq_len:       float64 [points]

    At a phase's first point, where none of its steps has ended, they are of its first step.
    """

    tasks: list[str]
    phases: list[str]
    steps: np.ndarray
    phase_ends: list[int]
    rates: np.ndarray
    epochs: np.ndarray
    tokens: np.ndarray
    learning_rate: np.ndarray
    batch: np.ndarray
    seq_len: np.ndarray


def check_plot_path(path: Path) -> None:
    """Raise InputError if no plot can be written to a path; called before anything is computed."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError("--plot", f"{path} ends in none of {', '.join(SUFFIXES)}", "name it so")
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError("--plot", f"{path} cannot be written", "name a file in a folder of yours")


def run_curves(config: RunConfig, plan: Plan, first_step: int) -> RunCurves:
    """Return the curves of a run.

    first_step: steps of the runs from which it was branched.
    """
    figures = plan.summary()["phases"]
    parts: dict[str, list[np.ndarray]] = {}
    before = np.zeros(len(plan.tasks))
    for number, (phase, spec) in enumerate(zip(plan.phases, plan.spec.phases, strict=True)):
        starts = [stage.first_step for stage, _ in spec.batch.within(phase.steps)]
        steps = _points(phase.steps, starts)
        ending = np.maximum(steps, 1) - 1  # the step that ends there, from 0
        counts = np.stack([plan.counts(number, int(step)) for step in steps])
        of_tasks = [figures[number]["tasks"][task] for task in plan.tasks]
        epochs, so_far = (
            np.array([facts[key] for facts in of_tasks]) for key in ("epochs", "epochs_so_far")
        )
        share = counts / np.maximum(1, phase.counts)
        tokens = counts * spec.kind.seq_len
        schedule = config.phases[number].learning_rate
        batch = [spec.batch.samples_at(step) for step in ending.tolist()]
        full = config.phase_batch(number).samples
        rate = [
            learning_rate(schedule, step, phase.steps) * batch_scale(schedule, samples, full)
            for step, samples in zip(ending.tolist(), batch, strict=True)
        ]
        added = {
            "steps": first_step + steps,
            "rates": plan.rates(number, ending),
            "epochs": so_far - epochs + epochs * share,
            "tokens": before + tokens,
            "learning_rate": np.array(rate),
            "batch": np.array(batch),
            "seq_len": np.full(len(steps), spec.kind.seq_len),
        }
        for key, values in added.items():
            parts.setdefault(key, []).append(values.astype(float))
        before = before + tokens[-1]
        first_step += phase.steps
    ends = np.cumsum([len(steps) for steps in parts["steps"]]).tolist()
    curves = {key: np.concatenate(values) for key, values in parts.items()}
    names = [phase.name for phase in plan.phases]
    return RunCurves(list(plan.tasks), names, phase_ends=ends, **curves)


def _points(steps: int, starts: Sequence[int]) -> np.ndarray:
    """Return the steps of a phase at which it is drawn, its end included."""
    even = np.linspace(0, steps, min(steps, POINTS_PER_PHASE) + 1).astype(np.int64)
    at_changes = [step for start in starts[:POINTS_PER_PHASE] for step in (start, start + 1)]
    inside = np.array([step for step in at_changes if step <= steps], np.int64)
    return np.unique(np.concatenate([even, inside]))


def run_figure(curves: RunCurves) -> Figure:
    """Return the picture: panels over the same steps, with a line where a phase begins."""
    colours = _colours(curves)
    shown = [curves.tasks[task] for task in colours]
    hidden = len(curves.tasks) - len(shown)
    names = [plot_label(name) for name in shown] + ([f"{hidden} others"] if hidden else [])
    right = WIDTH - label_width(names) - 0.35
    phase_names = _phase_names(curves, right - LEFT_INCHES)
    top = 0.12 + (1 + max(name.row for name in phase_names)) * LABEL_GAP_POINTS / 72
    height = BOTTOM_INCHES + sum(panel.height + GAP_INCHES for panel in PANELS) + top
    with plot_style():
        figure = new_figure(WIDTH, height)
        above = height - top - GAP_INCHES
        drawn: dict[Panel, Axes] = {}
        for panel in PANELS:
            axes = inch_axes(figure, LEFT_INCHES, above - panel.height, right, above)
            above -= panel.height + GAP_INCHES
            axes.set_title(panel.title, loc="left")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
            axes.yaxis.set_major_locator(MaxNLocator(4 if panel.height > 1 else 3))
            axes.set_xlim(curves.steps[0], max(curves.steps[-1], curves.steps[0] + 1))
            axes.tick_params(labelbottom=panel is PER_STEP)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
            axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
            axes.grid(False, axis="x")
            drawn[panel] = axes
        drawn[PER_STEP].set_xlabel("step")
        _draw_rates(drawn[RATES], curves, colours)
        _draw_tasks(drawn[EPOCHS], curves, curves.epochs, colours)
        _draw_tasks(drawn[TOKENS], curves, curves.tokens, colours)
        for panel, values in (
            (RATE, curves.learning_rate),
            (BATCH, curves.batch),
            (LENGTH, curves.seq_len),
            (PER_STEP, curves.batch * curves.seq_len),
        ):
            _draw_line(drawn[panel], curves, values, stepped=panel is not RATE)
        _mark_phases(drawn, curves, phase_names)
        keys = [
            Patch(facecolor=colour, label=name)
            for name, colour in zip(names, [*colours.values(), OTHERS_COLOUR], strict=False)
        ]
        drawn[RATES].legend(
            handles=keys[::-1],  # from top to bottom, as they are stacked
            loc="upper left",
            bbox_to_anchor=(1.0, 1.03),
            handlelength=1.0,
        )
    return figure


def save_run_plot(path: Path, config: RunConfig, plan: Plan, first_step: int) -> None:
    """Draw a run to a file, see `run_curves`, `run_figure` and `save_plot`."""
    save_plot(run_figure(run_curves(config, plan, first_step)), path)


def save_plot(figure: Figure, path: Path) -> None:
    """Write a picture; its suffix says in which format.

    Raises:
        InputError: the file cannot be written.
    """
    content = io.BytesIO()
    with plot_style(), mpl.rc_context({"svg.hashsalt": "megaphase"}):
        kind = path.suffix.lower().removeprefix(".")
        dates = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
        figure.savefig(content, format=kind, dpi=150, metadata=dates)
    aside = temporary_path(path)
    try:
        aside.write_bytes(content.getvalue())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        problem = f"{path} cannot be written ({error.strerror})"
        raise InputError("--plot", problem, "name another file") from None


def _colours(curves: RunCurves) -> dict[int, str]:
    """Return the tasks that have a colour of their own, and it: all if there are few, else those
    with most tokens and most epochs."""
    count, most = len(curves.tasks), MOST_COLOURED_TASKS
    if count <= most:
        chosen = list(range(count))
    else:
        by_tokens = np.argsort(-curves.tokens[-1], kind="stable").tolist()
        by_epochs = np.argsort(-curves.epochs[-1], kind="stable").tolist()
        kept = dict.fromkeys([*by_tokens[: most // 2 + 1], *by_epochs])
        chosen = sorted(list(kept)[:most])
    return dict(zip(chosen, LINE_COLOURS, strict=False))


def _phases(curves: RunCurves) -> list[slice]:
    return [slice(a, b) for a, b in pairwise([0, *curves.phase_ends])]


def _draw_rates(axes: Axes, curves: RunCurves, colours: dict[int, str]) -> None:
    """Stack the rates, which sum to 1; tasks without a colour are one area."""
    others = [task for task in range(len(curves.tasks)) if task not in colours]
    stacked = curves.rates[:, list(colours)]
    fills = list(colours.values())
    if others:
        stacked = np.column_stack([stacked, curves.rates[:, others].sum(1)])
        fills.append(OTHERS_COLOUR)
    for part in _phases(curves):
        axes.stackplot(curves.steps[part], stacked[part].T, colors=fills, lw=0, alpha=0.85)
    axes.set_ylim(0, 1)


def _draw_tasks(axes: Axes, curves: RunCurves, values: np.ndarray, colours: dict[int, str]) -> None:
    for task in range(len(curves.tasks)):
        colour, width = (colours[task], 1.5) if task in colours else (OTHERS_COLOUR, 0.7)
        order = 3 if task in colours else 2
        axes.plot(curves.steps, values[:, task], color=colour, lw=width, zorder=order)
    axes.set_ylim(bottom=0)


def _draw_line(axes: Axes, curves: RunCurves, values: np.ndarray, *, stepped: bool) -> None:
    """Draw a value of the run, without a connection between phases."""
    for part in _phases(curves):
        style = "steps-pre" if stepped else "default"
        axes.plot(curves.steps[part], values[part], color=INK, lw=1.5, drawstyle=style)
    axes.set_ylim(0, 1.15 * max(float(values.max()), 1e-12))


class _PhaseName(NamedTuple):
    """A phase's name above the picture, beside the step before it; row 0 is the lowest."""

    step: float
    text: str
    to_the_left: bool
    row: int


def _phase_names(curves: RunCurves, axes_width: float) -> list[_PhaseName]:
    """Return the names to write, each in the lowest row in which it covers no other."""
    every = -(-len(curves.phases) // MOST_PHASE_NAMES)
    firsts = [float(curves.steps[part.start]) for part in _phases(curves)]
    left, length = curves.steps[0], max(curves.steps[-1] - curves.steps[0], 1)
    taken: list[list[tuple[float, float]]] = []
    names = []
    for step, name in list(zip(firsts, curves.phases, strict=True))[::every]:
        at = (step - left) / length * axes_width
        width = NAME_CHARACTER_INCHES * (len(plot_label(name)) + 3)
        to_the_left = at + width > axes_width
        begin, end = (at - width, at) if to_the_left else (at, at + width)
        free = [all(end <= a or begin >= b for a, b in row) for row in taken]
        row = free.index(True) if True in free else len(taken)
        if row == len(taken):
            taken.append([])
        taken[row].append((begin, end))
        text = f"{plot_label(name)} →" if to_the_left else f"→ {plot_label(name)}"
        names.append(_PhaseName(step, text, to_the_left, row))
    return names


def _mark_phases(drawn: dict[Panel, Axes], curves: RunCurves, names: list[_PhaseName]) -> None:
    """Draw a line in all panels where a phase begins, and write names above the first one."""
    for part in _phases(curves)[1:]:
        for axes in drawn.values():
            axes.axvline(float(curves.steps[part.start]), color=MUTED, lw=0.7, zorder=4)
    for name in names:
        drawn[RATES].annotate(
            name.text,
            (name.step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 20 + name.row * LABEL_GAP_POINTS),
            textcoords="offset points",
            ha="right" if name.to_the_left else "left",
            va="bottom",
        )
