"""The page of a sweep: the verdict first, then the evidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from megaphase.report.page import DrawnPlot, PageTable, Plot, draw_plot, render
from megaphase.report.report_files import PLOTS_FOLDER
from megaphase.sweep.arms.budgets import own_budgets
from megaphase.sweep.law.section import law_section
from megaphase.sweep.law.sweep_law import SweepLaw
from megaphase.sweep.pareto.curve_figures import curve_figures, overfitting_figure
from megaphase.sweep.pareto.figures import (
    bleu_front_plot,
    front_plot,
    models_plot,
    training_front_plot,
)
from megaphase.sweep.pareto.fronts import ModelFronts
from megaphase.sweep.pareto.grid_edges import grid_edges_sentence
from megaphase.sweep.pareto.pruned import pruned_sentence
from megaphase.sweep.pareto.tables import (
    first_stage_table,
    fronts_table,
    overfitting_table,
    settings_tables,
)
from megaphase.sweep.pareto.verdict_tables import (
    ContrastTables,
    contrast_tables,
    margins_table,
    tokens_table,
)
from megaphase.sweep.pareto.view import SweepView
from megaphase.sweep.sweep import Sweep

SPLITS = {
    "test": "Settings are chosen on the validation split, and losses are shown on the test split.",
    "validation": "Losses are those on the validation split, by which settings are chosen, too.",
}
CLASSES = {"wins": "better", "loses": "worse", "undecided": "undecided"}


@dataclass(frozen=True)
class _Overfitting:
    figure: DrawnPlot
    table: PageTable


@dataclass(frozen=True)
class _ModelEvidence:
    """Tables and figures of one of the sweep's models; `suffix` names it in the headings."""

    suffix: str
    contrasts: ContrastTables | None
    fronts: PageTable
    margins: PageTable | None
    on_fronts: PageTable
    off_fronts: PageTable | None
    tokens: PageTable | None
    overfitting: _Overfitting | None
    curves: list[DrawnPlot]


@dataclass(frozen=True)
class _Evidence:
    """The evidence for the verdict."""

    trade_off: DrawnPlot
    models: list[_ModelEvidence]
    across_models: list[DrawnPlot]


def sweep_article(view: SweepView, law: SweepLaw, out: Path) -> Markup:
    """Return the article on a sweep; its plots are written into the report's folder `out`."""
    content = sweep_file_of(view.record.sweep)
    has_points = any(fronts.points for fronts in view.fronts)
    return render(
        "sweep.html",
        name=view.name,
        lead=_lead(view),
        warnings=view.record.sweep.warnings,
        verdicts=view.verdicts,
        grid_edges=grid_edges_sentence(view.fronts),
        changes=view.changes.changes,
        classes=CLASSES,
        evidence=_evidence(view, out) if has_points else None,
        law=law_section(law, out),
        first_stages=first_stage_table(view),
        failures=view.failures,
        pruned=view.pruned,
        pruned_sentence=pruned_sentence(view.pruned),
        sweep_file=yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
    )


def _evidence(view: SweepView, out: Path) -> _Evidence:
    """Return plots and tables."""
    across = (training_front_plot(view), models_plot(view), bleu_front_plot(view))
    return _Evidence(
        _draw(front_plot(view), out),
        [_model_evidence(view, fronts, out) for fronts in view.fronts],
        [_draw(plot, out) for plot in across if plot is not None],
    )


def _model_evidence(view: SweepView, fronts: ModelFronts, out: Path) -> _ModelEvidence:
    on_fronts, off_fronts = settings_tables(view, fronts)
    overfitting = None
    if (plot := overfitting_figure(view, fronts)) is not None:
        overfitting = _Overfitting(_draw(plot, out), overfitting_table(view, fronts))
    return _ModelEvidence(
        "" if fronts.model is None else f", {fronts.model}",
        contrast_tables(view, fronts),
        fronts_table(view, fronts),
        margins_table(view, fronts),
        on_fronts,
        off_fronts,
        tokens_table(view, fronts),
        overfitting,
        [_draw(plot, out) for plot in curve_figures(view, fronts)] if fronts.points else [],
    )


def _draw(plot: Plot, out: Path) -> DrawnPlot:
    return draw_plot(plot, out, PLOTS_FOLDER)


def _lead(view: SweepView) -> str:
    """Return the progress of the sweep and its setting."""
    sweep = view.record.sweep
    seeds = len(sweep.config.seeds)
    failed = f" {len(view.failures)} of them failed or diverged." if view.failures else ""
    return (
        f"{view.progress.sentence}{failed} {_budget(sweep)} "
        f"High-resource: {', '.join(sweep.high)}; low-resource: {', '.join(sweep.low)}. "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'} per setting. {SPLITS[view.split]} "
        f"{view.changes.sentence}"
    )


def _budget(sweep: Sweep) -> str:
    others = own_budgets(sweep)
    if not others:
        return f"Every run has {sweep.steps:,} steps."
    return f"Every run has {sweep.steps:,} steps, except that {'; '.join(others)}."


def sweep_file_of(sweep: Sweep) -> dict[str, Any]:
    """Return the sweep file including the run file; paths are reduced to their last part.

    The location of files on a machine is not part of an experiment.
    """
    run = sweep.base | {"tokenizer": Path(sweep.base["tokenizer"]).name}
    run["tasks"] = {
        task: settings | {"corpus": Path(settings["corpus"]).name}
        for task, settings in run["tasks"].items()
    }
    content = sweep.config.model_dump(mode="json", exclude_unset=True, exclude={"run", "output"})
    return {"output": sweep.config.output.name} | content | {"run": run}
