"""The page of a sweep: the verdict on top, then what it rests on."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import yaml

from megaphase.report.page import Plot, add_plot
from megaphase.report.report_files import PLOTS_FOLDER
from megaphase.sweep.pareto.figures import (
    bleu_front_plot,
    front_plot,
    models_plot,
    other_figures,
    overfitting_figure,
)
from megaphase.sweep.pareto.fronts import ModelFronts
from megaphase.sweep.pareto.tables import (
    first_stage_table,
    fronts_table,
    overfitting_table,
    settings_tables,
)
from megaphase.sweep.pareto.view import SweepView
from megaphase.sweep.sweep import Sweep

CLASSES = {"wins": "better", "loses": "worse", "undecided": "undecided"}


def sweep_article(view: SweepView, out: Path) -> str:
    """All of a sweep; its plots are written into the report's folder `out`."""
    parts = [
        f"<article>\n<h2>{escape(view.name)}</h2>",
        f'<p class="lead">{escape(_lead(view))}</p>',
        _verdicts(view),
    ]
    if any(fronts.points for fronts in view.fronts):
        parts += _evidence(view, out)
    if stages := first_stage_table(view):
        parts += ["<h3>Learning rates of the first stages</h3>", stages]
    parts += [_failures(view), _sweep_file(view.record.sweep), "</article>"]
    return "\n".join(part for part in parts if part)


def _evidence(view: SweepView, out: Path) -> list[str]:
    """Plots and tables."""

    def add(plot: Plot | None) -> str:
        return "" if plot is None else add_plot(plot, out, PLOTS_FOLDER)

    parts = [add(front_plot(view))]
    for fronts in view.fronts:
        parts += [_heading("Fronts", fronts), fronts_table(view, fronts)]
        parts += [settings_tables(view, fronts)]
    for fronts in view.fronts:
        if (plot := overfitting_figure(view, fronts)) is not None:
            parts += [_heading("Overfitting", fronts), add(plot), overfitting_table(view, fronts)]
    parts += [add(models_plot(view)), add(bleu_front_plot(view))]
    for fronts in view.fronts:
        if fronts.points:
            parts.append(_heading("Curves and choices", fronts))
            parts += [add(plot) for plot in other_figures(view, fronts)]
    return parts


def _heading(title: str, fronts: ModelFronts) -> str:
    model = "" if fronts.model is None else f", {fronts.model}"
    return f"<h3>{escape(title + model)}</h3>"


def _lead(view: SweepView) -> str:
    """How far the sweep is, and what it is over."""
    sweep = view.record.sweep
    seeds = len(sweep.config.seeds)
    failed = f" {len(view.failures)} of them failed or diverged." if view.failures else ""
    return (
        f"{view.progress.sentence}{failed} Every run has {sweep.steps:,} steps. "
        f"High-resource: {', '.join(sweep.high)}; low-resource: {', '.join(sweep.low)}. "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'} per setting."
    )


def _verdicts(view: SweepView) -> str:
    items = "\n".join(
        f'<li class="{CLASSES[verdict.outcome]}"><b>{escape(verdict.headline)}:</b> '
        f"{escape(verdict.detail)}.</li>"
        for verdict in view.verdicts
    )
    return f'<ul class="verdicts">\n{items}\n</ul>' if items else ""


def _failures(view: SweepView) -> str:
    if not view.failures:
        return ""
    items = "\n".join(
        f"<li><code>{escape(name)}</code>: {escape(reason)}</li>" for name, reason in view.failures
    )
    note = "A setting of which a run has failed or diverged is not among the points."
    title = "<h3>Runs that failed or diverged</h3>"
    return f'{title}\n<ul>\n{items}\n</ul>\n<p class="note">{note}</p>'


def _sweep_file(sweep: Sweep) -> str:
    text = yaml.safe_dump(sweep_file_of(sweep), sort_keys=False, allow_unicode=True)
    return f"<details>\n<summary>Sweep file</summary>\n<pre>{escape(text)}</pre>\n</details>"


def sweep_file_of(sweep: Sweep) -> dict[str, Any]:
    """The sweep file with the run file inside; of paths only what they end in.

    Where things lie on a machine is no part of an experiment.
    """
    run = sweep.base | {"tokenizer": Path(sweep.base["tokenizer"]).name}
    run["tasks"] = {
        task: settings | {"corpus": Path(settings["corpus"]).name}
        for task, settings in run["tasks"].items()
    }
    content = sweep.config.model_dump(mode="json", exclude_unset=True, exclude={"run", "output"})
    return {"output": sweep.config.output.name} | content | {"run": run}
