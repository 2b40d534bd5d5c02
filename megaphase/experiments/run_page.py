"""What a report page says of one run: verdict, tables, settings, plots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from megaphase.experiments import page
from megaphase.experiments.losses import (
    SAME_LOSS_NATS,
    PhaseLoss,
    Verdict,
    describe_change,
    final_losses,
    high_resource_sentence,
    ordered_tasks,
    phase_speeds,
    task_verdicts,
)
from megaphase.experiments.page import Plot
from megaphase.experiments.plots import (
    REPETITION_LIMIT_EPOCHS,
    Colours,
    change_since_switch_plot,
    epochs_plot,
    learning_rate_plot,
    tokens_plot,
    validation_loss_plot,
)
from megaphase.experiments.runs import RunRecord

NOTHING = "–"


def run_state(run: RunRecord) -> str:
    """One line: how far the run has come and when it switched."""
    planned = run.plan.phases[-1].first_step + run.plan.phases[-1].steps
    names = " → ".join(phase.name for phase in run.plan.phases)
    switches = ", ".join(f"{step:,}" for step, _ in run.switch_steps)
    switched = f", switched at step {switches}" if switches else ""
    if run.phase_is_over(run.plan.phases[-1].name):
        return f"{names}: finished after {run.last_step:,} steps{switched}."
    return f"{names}: still going, {run.last_step:,} of {planned:,} steps{switched}."


def verdict_list(run: RunRecord) -> str:
    """The verdicts as a list, each marked as better or worse."""
    found = task_verdicts(run)
    items = [_verdict_item(v) for v in found if v.low_resource]
    high = [v for v in found if not v.low_resource]
    if high:
        sentence = high_resource_sentence(run, [])
        lines = "".join(_verdict_item(v) for v in high)
        items.append(f"<li>{escape(sentence)}<ul>{lines}</ul></li>")
    return f'<ul class="verdicts">{"".join(items)}</ul>'


def _verdict_item(verdict: Verdict) -> str:
    name, rest = verdict.text[: len(verdict.task)], verdict.text[len(verdict.task) :]
    change = escape(describe_change(verdict.change))
    rest = escape(rest).replace(change, f'<b class="change">{change}</b>', 1)
    return f'<li class="{_direction(verdict)}"><b>{escape(name)}</b>{rest}</li>'


def _direction(verdict: Verdict) -> str:
    if not math.isfinite(verdict.change) or abs(verdict.change) < SAME_LOSS_NATS:
        return "same"
    return "better" if verdict.change < 0 else "worse"


def run_sections(run: RunRecord, colours: Colours, figures: Mapping[str, str], level: int) -> str:
    """All sections of one run; `figures` maps the names of `run_plots` to their markup."""
    return "\n".join(
        page.section(title, body, level)
        for title, body in (
            ("Validation loss over steps", figures["validation_loss"] + figures.get("change", "")),
            ("Validation loss at the ends of each phase", _loss_table(run, colours)),
            (
                "Data: sampling rate, tokens and epochs",
                _data_table(run, colours) + figures["tokens"] + figures["epochs"],
            ),
            ("Learning rate", figures["learning_rate"]),
            ("Throughput", _speed_table(run)),
            ("Settings", page.definitions(list(settings_summary(run)))),
        )
    )


def run_plots(run: RunRecord, colours: Colours) -> dict[str, Plot]:
    """The plots of one run, by the name under which `run_sections` looks for them."""
    plots = [
        Plot(
            "validation_loss",
            "Loss on held-out text",
            "Dashed: the switch to the next phase. The value before the first step is left out.",
            lambda size: validation_loss_plot(run, colours, size),
        ),
        Plot(
            "learning_rate",
            "Learning rate",
            "Each phase has its own schedule.",
            lambda size: learning_rate_plot(run, size),
        ),
        Plot(
            "tokens",
            "Training tokens per task",
            "As planned, phase by phase.",
            lambda size: tokens_plot(run, colours, size),
        ),
        Plot(
            "epochs",
            "Epochs per task",
            "How often each task's text is seen, as planned. "
            f"Beyond {REPETITION_LIMIT_EPOCHS:g} epochs repetition pays little.",
            lambda size: epochs_plot(run, colours, size),
        ),
    ]
    if run.switch_steps:
        plots.append(
            Plot(
                "change",
                "Change since the switch",
                "Held-out loss minus its value at the switch: below 0 is better.",
                lambda size: change_since_switch_plot(run, colours, size),
            )
        )
    return {plot.name: plot for plot in plots}


def task_cell(task: str, colours: Colours, low_resource: bool) -> str:
    """The task's name with its colour in the plots."""
    variable = page.colour_variable(colours[task])
    mark = '<span class="low">low</span>' if low_resource else ""
    return f'<span class="swatch" style="background: {variable}"></span>{escape(task)}{mark}'


def _loss_table(run: RunRecord, colours: Colours) -> str:
    losses = {(loss.phase, loss.task): loss for loss in final_losses(run)}
    phases = [p for p in run.plan.phases if any(name == p.name for name, _ in losses)]
    groups: list[tuple[str, Sequence[str]]] = []
    for phase in phases:
        complete = run.phase_is_over(phase.name)
        groups.append((phase.name, ("start", "end" if complete else "so far", "best at step")))
    groups.append(("bits per byte", ("first", *(f"after {phase.name}" for phase in phases))))
    rows = []
    for task in ordered_tasks(run):
        found = [losses.get((phase.name, task)) for phase in phases]
        if not any(found):
            continue
        cells = [task_cell(task, colours, task in run.low_resource_tasks)]
        for loss in found:
            cells += _phase_cells(loss)
        cells.append(f"{found[0].start_bits_per_byte:.3f}" if found[0] else NOTHING)
        cells += [f"{loss.end_bits_per_byte:.3f}" if loss else NOTHING for loss in found]
        rows.append(cells)
    return page.table(page.grouped_head("task", groups), rows, "Losses in nats per token.")


def _phase_cells(loss: PhaseLoss | None) -> list[str]:
    if loss is None:
        return [NOTHING] * 3
    best = f"{loss.best:.3f} <small>{loss.best_step:,}</small>"
    return [f"{loss.start:.3f}", f"{loss.end:.3f}", best]


def _data_table(run: RunRecord, colours: Colours) -> str:
    phases = run.plan.phases
    groups: list[tuple[str, Sequence[str]]] = [("corpus", ("tokens", "held out"))]
    groups += [(phase.name, ("rate", "tokens", "epochs")) for phase in phases]
    groups.append(("epochs in all", ()))
    rows = []
    for task in ordered_tasks(run):
        corpus = run.plan.tasks[task]
        cells = [
            task_cell(task, colours, task in run.low_resource_tasks),
            f"{corpus.tokens:,}",
            f"{corpus.held_out_documents:,} of {corpus.documents:,}",
        ]
        epochs = 0.0
        for phase in phases:
            share = phase.tasks.get(task)
            if share is None or share.rate == 0:
                cells += [NOTHING] * 3
                continue
            epochs = max(epochs, share.epochs_so_far)
            cells += [f"{share.rate:.2%}", f"{share.tokens:,}", f"{share.epochs:.2f}"]
        cells.append(_epochs_cell(epochs))
        rows.append(cells)
    note = (
        "As planned. Held out: documents kept for validation. "
        f"⚠ more than {REPETITION_LIMIT_EPOCHS:g} epochs."
    )
    return page.table(page.grouped_head("task", groups), rows, note)


def _epochs_cell(epochs: float) -> str:
    if epochs > REPETITION_LIMIT_EPOCHS:
        return f'<span class="warning">⚠ {epochs:.2f}</span>'
    return f"{epochs:.2f}" if epochs else NOTHING


def _speed_table(run: RunRecord) -> str:
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("phase", "steps", "tokens", "time", "s/step", "tokens/s", "MFU")
    )
    rows = [
        [
            escape(speed.phase),
            f"{speed.steps:,}",
            f"{speed.tokens:,}",
            _duration(speed.seconds),
            f"{speed.step_seconds:.3g}",
            f"{speed.tokens_per_second:,.0f}",
            NOTHING if speed.mfu is None else f"{speed.mfu:.1%}",
        ]
        for speed in phase_speeds(run)
    ]
    return page.table(f"<tr>{head}</tr>", rows, "Steps only, medians; MFU: share of peak FLOP/s.")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {seconds:02.0f} s"


def settings_summary(run: RunRecord) -> Iterable[tuple[str, str]]:
    """(term, value) of the settings that a reader asks for first, as far as run.json has them."""
    plan, settings = run.plan, run.settings
    for term in ("model", "parallel", "optimizer"):
        if settings.get(term):
            yield term, _in_words(settings[term])
    yield "sequence length", f"{plan.seq_len:,} tokens"
    yield (
        "batch",
        f"{plan.samples_per_step:,} samples a step, "
        f"{plan.samples_per_step * plan.seq_len:,} tokens",
    )
    for term in ("precision", "seed"):
        if term in settings:
            yield term, str(settings[term])
    rates = {p.get("name"): p.get("learning_rate") for p in settings.get("phases") or ()}
    for phase in plan.phases:
        text = f"{phase.steps:,} steps, {phase.tokens:,} tokens, "
        text += f"optimizer state: {phase.optimizer_state}"
        if rates.get(phase.name):
            text += f", learning rate: {_in_words(rates[phase.name])}"
        yield f"phase {phase.name}", text


def _in_words(value: Any) -> str:
    """A setting as plain text, without what is unset."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_in_words(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return " and ".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
