"""The figure of a law: predicted against measured losses, a panel per task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from megaphase.report.plot_parts import (
    legend_columns,
    legend_inches,
    legend_on_top,
    line_key,
    panel_grid,
)
from megaphase.sweep.law.law import TaskLaw
from megaphase.sweep.pareto.arm_styles import style_of_arms
from megaphase.utils.plot_style import MUTED, Size, plot_label, plot_style


def predictions_plot(laws: Sequence[TaskLaw], arms: Sequence[str], size: Size) -> Figure:
    """Return a figure with the fitted and the left-out prediction of every setting.

    arms: of the sweeps, also those without a setting here, so that colours are as in other figures.
    """
    shown = {_arm(law, i) for law in laws[:1] for i in range(len(law.means.rows))}
    styles = {arm: style for arm, style in style_of_arms(arms).items() if arm in shown}
    columns = legend_columns(list(styles), size)
    keys = [
        line_key(plot_label(arm), colour, marker=marker, ms=5, lw=0)
        for arm, (colour, marker) in styles.items()
    ]
    titles = [law.task for law in laws]
    with plot_style():
        top = legend_inches(list(styles), columns)
        figure, panels = panel_grid(size, titles, 0.85 * size.height, top)
        for axes, law in zip(panels, laws, strict=True):
            measured = law.means.losses
            fitted, left_out = law.fit.predict(law.fit.table), measured - law.chosen.errors
            noise = np.zeros(len(measured))
            if law.means.noise is not None:
                noise = law.means.noise / np.sqrt(law.means.counts)
            every = np.concatenate([measured, fitted, left_out])
            low, high = float(every.min()), float(every.max())
            room = 0.05 * max(high - low, 0.02)
            ends = [low - room, high + room]
            axes.plot(ends, ends, color=MUTED, lw=0.8, zorder=1)
            for arm, (colour, marker) in styles.items():
                own = [i for i in range(len(measured)) if _arm(law, i) == arm]
                axes.errorbar(measured[own], fitted[own], xerr=noise[own], color=colour,
                              marker=marker, ms=4.5, elinewidth=0.8, lw=0, zorder=3)  # fmt: skip
                axes.plot(measured[own], left_out[own], color=colour, marker=marker, ms=6.5,
                          mfc="none", mew=0.9, lw=0, zorder=2)  # fmt: skip
            axes.set_xlim(*ends)
            axes.set_ylim(*ends)
            axes.set_xlabel("measured, nats per token")
            axes.set_ylabel("predicted")
        legend_on_top(figure, keys, columns)
    return figure


def _arm(law: TaskLaw, i: int) -> str:
    setting = law.means.rows[i].setting
    return "" if setting is None else setting.arm
