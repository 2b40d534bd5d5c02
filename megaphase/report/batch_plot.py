"""The plot of batch and sequence length over the steps of a run in which they change."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megaphase.report.plot_parts import Curve, panel_grid, step_axes, thinned
from megaphase.report.plots import mark_gaps, mark_steps, step_label_inches, steps_of
from megaphase.report.runs import PhasePlan, RunRecord
from megaphase.utils.plot_style import INK, Size, plot_style, short_number


def batch_plot(run: RunRecord, size: Size) -> Figure:
    """Plot samples and, where it changes, sequence length of every step, a panel for each."""
    phases = run.phases_begun
    lengths = [run.model_of(phase)["seq_len"] or 1 for phase in phases]
    titles = ["batch (samples)", *(["sequence length (tokens)"] if len(set(lengths)) > 1 else [])]
    with plot_style():
        height = 0.62 * size.height
        figure, panels = panel_grid(size, titles, height, step_label_inches(run))
        for title, axes in zip(titles, panels, strict=True):
            step_axes(axes, steps_of([run]), size, ticks=5)
            # Above the labels of the switches, which every panel has.
            axes.set_title(
                title, loc="left", fontweight="bold", pad=6 + 72 * step_label_inches(run)
            )
            for phase, length in zip(phases, lengths, strict=True):
                steps, tokens = tokens_per_step(run, phase)
                values = tokens / length if title == titles[0] else np.full(len(steps), length)
                axes.plot(*thinned((steps, values)), color=INK, lw=1.5)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            mark_gaps(axes, run)
            mark_steps(axes, run)
    return figure


def tokens_per_step(run: RunRecord, phase: PhasePlan) -> Curve:
    """Return steps and tokens of the steps of a phase whose predecessor has a row, too."""
    training, origin = run.training, run.origin
    before = np.append(origin.step, training.step[:-1])
    counted = np.append(origin.tokens or 0, training.tokens[:-1])
    found = training.are_of(phase.name) & (before == training.step - 1)
    return training.step[found], (training.tokens - counted)[found].astype(np.float64)


def batch_changes(run: RunRecord) -> bool:
    """Return whether the samples of a step, or their sequence length, change within the run."""
    sizes = {
        (length, float(tokens))
        for phase in run.phases_begun
        for length in [run.model_of(phase)["seq_len"]]
        for tokens in np.unique(tokens_per_step(run, phase)[1])
    }
    return len(sizes) > 1
