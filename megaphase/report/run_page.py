"""The articles of a report page: state, verdicts, plots and tables of a run; comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from markupsafe import Markup

from megaphase.plan.plan import REPEATED_TOO_OFTEN
from megaphase.report.batch_plot import batch_changes, batch_plot
from megaphase.report.benchmarks import benchmark_table
from megaphase.report.differences import Difference, differences, tokenizers_differ
from megaphase.report.incidents import divergences, incident_sentences
from megaphase.report.losses import (
    final_losses,
    lengths_note,
    newest_losses,
    task_verdicts,
)
from megaphase.report.page import Cell, PageTable, Plot, css_colour, draw_plot, render
from megaphase.report.plots import (
    Colours,
    comparison_is_cut_off,
    comparison_plot,
    data_plot,
    learning_rate_plot,
    loss_is_cut_off,
    loss_plot,
    rates_plot,
    validated_tasks,
)
from megaphase.report.runs import PhasePlan, RunRecord

NOTHING = "–"
STEEP = "; the steep beginning is cut off at the top"
BITS_PER_BYTE = "Bits per byte of text, because the runs have different tokenizers."
AS_PLANNED = "As planned, or the actual values if a phase ended early."


def run_article(run: RunRecord, colours: Colours, out: Path, plot_folder: str) -> Markup:
    """Return the article on one run; its plots are written into `out/plot_folder`."""
    losses = Plot(
        "loss",
        "Loss per task",
        _loss_caption(run),
        lambda size: loss_plot(run, colours, size),
    )
    rates = Plot(
        "learning_rate",
        "Learning rate",
        "Each phase begins its own schedule unless the run file says otherwise.",
        lambda size: learning_rate_plot(run, size),
    )
    data = Plot(
        "data",
        "Training tokens and epochs per task",
        f"{AS_PLANNED} An epoch is one pass over the task's training text{_limit_in_words(run)}.",
        lambda size: data_plot(run, colours, size),
    )
    mixture = Plot(
        "rates",
        "Sampling rates",
        f"{AS_PLANNED} Where a rate changes within a phase, the tables have its mean.",
        lambda size: rates_plot(run, colours, size),
    )
    batch = Plot(
        "batch",
        "Batch and sequence length",
        "Of every step that has been trained: samples, and tokens of a sample.",
        lambda size: batch_plot(run, size),
    )
    changes = any(phase.rates_over_steps is not None for phase in run.plan.phases)
    return render(
        "run.html",
        name=run.name,
        state=_state(run),
        incidents=incident_sentences(run),
        verdicts=task_verdicts(run),
        losses=draw_plot(losses, out, plot_folder),
        loss_table=_loss_table(run, colours),
        benchmark_table=benchmark_table(run),
        data=draw_plot(data, out, plot_folder),
        data_table=_data_table(run, colours),
        sampling_rates=draw_plot(mixture, out, plot_folder) if changes else None,
        learning_rate=draw_plot(rates, out, plot_folder),
        batch=draw_plot(batch, out, plot_folder) if batch_changes(run) else None,
        run_file=yaml.safe_dump(dict(run.settings), sort_keys=False, allow_unicode=True),
    )


def comparison_article(runs: Sequence[RunRecord], colours: Colours, out: Path) -> Markup:
    """Return the article that compares several runs: newest losses, differences and curves."""
    plot = Plot(
        "comparison",
        "Loss on held-out text, task by task",
        f"{BITS_PER_BYTE if tokenizers_differ(runs) else 'Nats per token.'} "
        f"Every panel has its own scale{STEEP if comparison_is_cut_off(runs) else ''}.",
        lambda size: comparison_plot(runs, size),
    )
    return render(
        "comparison.html",
        runs=len(runs),
        table=_comparison_table(runs, colours),
        differences=_differences_table(runs, differences(runs)),
        figure=draw_plot(plot, out, "plots"),
    )


def _loss_caption(run: RunRecord) -> str:
    """Return what the figure of the losses shows, without what this run does not have."""
    lines = ["faint: the training loss"]
    if any(row.validation_average for row in run.validation):
        lines.append("dotted: the average of the weights")
    if run.switches:
        lines.append("dashed: the switch to the next phase")
    if divergences(run):
        lines.append("solid: where training diverges")
    steep = STEEP if loss_is_cut_off(run) else ""
    return f"On held-out text; {'; '.join(lines)}{steep}."


def _limit_in_words(run: RunRecord) -> str:
    """Return what the dashed line of the figure of epochs is; empty where it is not drawn."""
    if max(map(run.epochs_of_phases, run.tasks), default=0.0) <= REPEATED_TOO_OFTEN:
        return ""
    return f"; dashed: {REPEATED_TOO_OFTEN:g} epochs, beyond which repetition has little benefit"


def _state(run: RunRecord) -> str:
    """Return the progress of the run, when it switched and how fast it is."""
    last = run.plan.phases[-1]
    source = run.origin.source
    begun = f" (the first {run.origin.step:,} of {source or 'another run'})"
    begun = begun if run.origin.step else f", from the weights of {source}" if source else ""
    if run.ended_diverged is not None:
        text = f"Diverged: ended after {run.last_step:,} of {run.planned_steps:,} steps{begun}"
    elif run.phase_is_over(last):
        text = f"Finished after {run.last_step:,} steps{begun}"
    else:
        text = f"Not finished: {run.last_step:,} of {run.planned_steps:,} steps{begun}"
    text += "".join(f", {name} from step {step:,}" for step, name in run.switches)
    text += "".join(
        f"; {phase.name} ended early, after {phase.steps:,} steps: {phase.ended_early}"
        for phase in run.plan.phases
        if phase.ended_early is not None
    )
    text += "".join(
        f"; {name} trains only the rows of tokens {first:,} to {stop - 1:,}"
        for name, (first, stop) in run.trained_tokens.items()
    )
    if len(run.training):
        speed = np.median(run.training.tokens_per_second)
        before = run.origin.tokens if run.origin.step else None
        share = f" ({before:,} of them before)" if before is not None else ""
        text += f"; {run.training.tokens[-1]:,} tokens{share}, {speed:,.0f} a second (median)"
    if run.hole is not None:
        text += f"; {run.hole}"
    return f"{text}."


def _task_cell(task: str, colours: Colours) -> Cell:
    """Return the task's name with its colour in the plots."""
    return Cell(task, colour=css_colour(colours[task]))


def _loss_table(run: RunRecord, colours: Colours) -> PageTable:
    losses = {(loss.phase, loss.task): loss for loss in final_losses(run)}
    phases = run.phases_begun
    with_gap = any(loss.end_gap is not None for loss in losses.values())
    last_columns = ("best", "bits/byte", "gap") if with_gap else ("best", "bits/byte")
    averages = {p.name: _newest_average(run, p.name) for p in phases}
    groups = [
        (
            p.name,
            (
                "start",
                "end" if run.phase_is_over(p) else "so far",
                *last_columns,
                *(("average",) if averages[p.name] else ()),
            ),
        )
        for p in phases
    ]
    rows = []
    for task in validated_tasks([run]):
        cells: list[str | Cell] = [_task_cell(task, colours)]
        for phase in phases:
            loss = losses.get((phase.name, task))
            cells += [NOTHING] * 4 if loss is None else [
                f"{loss.start:.3f}",
                Cell(f"{loss.end:.3f}", bold=True),
                Cell(f"{loss.best:.3f}", small=f"at {loss.best_step:,}"),
                f"{loss.end_bits_per_byte:.3f}",
            ]  # fmt: skip
            if with_gap:
                gap = None if loss is None else loss.end_gap
                cells.append(NOTHING if gap is None else f"{gap:+.3f}")
            if averages[phase.name]:
                found = averages[phase.name].get(task)
                cells.append(NOTHING if found is None else f"{found:.3f}")
        rows.append(cells)
    note = "Nats per token; best: the lowest, and its step; bits per byte of text: at the end."
    if with_gap:
        note += " Gap: how far the loss is above that on the training text, at the end."
    if any(averages.values()):
        note += " Average: the loss of the average of the weights, at the end."
    if lengths := lengths_note([run]):
        note += f" {lengths}"
    return PageTable(["task"], rows, note, groups)


def _newest_average(run: RunRecord, phase: str) -> dict[str, float]:
    """Return the newest losses of the average of a phase's weights by task; empty without one."""
    rows = [row.validation_average for row in run.validation_in(phase) if row.validation_average]
    return {task: figures.loss for task, figures in rows[-1].items()} if rows else {}


def _with_length(phase: PhasePlan) -> str:
    """A phase's name, and its sequence length where phases may have several."""
    return phase.name if phase.seq_len is None else f"{phase.name} (seq_len {phase.seq_len:,})"


def _data_table(run: RunRecord, colours: Colours) -> PageTable:
    phases = run.plan.phases
    groups: list[tuple[str, Sequence[str]]] = [("corpus", ("tokens", "documents", "held out"))]
    groups += [(_with_length(phase), ("rate", "tokens", "epochs")) for phase in phases]
    is_branch = run.origin.step > 0
    groups.append(("this branch" if is_branch else "whole run", ("tokens", "epochs")))
    groups += [("with the run before", ("epochs",))] if is_branch else []
    rows = []
    for task in run.tasks:
        corpus = run.plan.tasks[task]
        cells: list[str | Cell] = [_task_cell(task, colours)]
        cells += [f"{n:,}" for n in (corpus.tokens, corpus.documents, corpus.held_out_documents)]
        shares = [phase.tasks.get(task) for phase in phases]
        for share in shares:
            cells += [NOTHING] * 3 if share is None or not share.samples else [
                f"{share.rate:.2%}", f"{share.tokens:,}", f"{share.epochs:.2f}",
            ]  # fmt: skip
        epochs = run.planned_epochs(task)
        cells.append(f"{sum(share.tokens for share in shares if share):,}")
        if is_branch:
            cells.append(f"{run.epochs_of_phases(task):.2f}")
        often = epochs > REPEATED_TOO_OFTEN
        cells.append(Cell(f"{epochs:.2f}", warning=often))
        rows.append(cells)
    note = f"{AS_PLANNED} Held out: documents kept for validation."
    if any(run.planned_epochs(task) > REPEATED_TOO_OFTEN for task in run.tasks):
        note += f" ⚠ repeated more than {REPEATED_TOO_OFTEN:g} times."
    return PageTable(["task"], rows, note, groups)


def _comparison_table(runs: Sequence[RunRecord], colours: Colours) -> PageTable:
    newest = {run.name: newest_losses(run) for run in runs}
    in_bits = tokenizers_differ(runs)
    tasks = validated_tasks(runs)
    rows = []
    for run in runs:
        source = run.origin.source
        cells: list[str | Cell] = [Cell(run.name, small=f"from {source}" if source else "")]
        for task in tasks:
            ends = {
                name: losses[task].end_bits_per_byte if in_bits else losses[task].end
                for name, losses in newest.items()
                if task in losses
            }
            text = f"{ends[run.name]:.3f}" if run.name in ends else NOTHING
            lowest = ends.get(run.name) == min(ends.values())
            cells.append(Cell(text, bold=lowest))
        cells.append(f"{run.last_step:,}")
        rows.append(cells)
    columns: list[str | Cell] = ["run", *(_task_cell(task, colours) for task in tasks), "steps"]
    note = "Newest validation loss, nats per token; the lowest of each task is bold."
    if in_bits:
        note = f"Newest validation loss; the lowest of each task is bold. {BITS_PER_BYTE}"
    if lengths := lengths_note(runs):
        note += f" {lengths}"
    return PageTable(columns, rows, note)


def _differences_table(runs: Sequence[RunRecord], found: Sequence[Difference]) -> PageTable | None:
    """Return the settings in which the runs differ, a column for each run; None if in none."""
    if not found:
        return None
    note = (
        "From the run files; rates are those of the plan, and the phases of a branch are those of "
        "the branch alone. What is not listed is the same in all of these runs."
    )
    rows = [[each.setting, *each.values] for each in found]
    return PageTable(["differs in", *(run.name for run in runs)], rows, note, words=True)
