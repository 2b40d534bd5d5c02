"""The tables of a sweep's page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from megaphase.report import page
from megaphase.report.losses import RISING_NATS
from megaphase.report.run_page import NOTHING
from megaphase.sweep.pareto.first_stages import first_stages
from megaphase.sweep.pareto.fronts import ArmFront, ModelFronts
from megaphase.sweep.pareto.overfit import Overfit, overfits
from megaphase.sweep.pareto.points import Point, SeedMean
from megaphase.sweep.pareto.view import SweepView


def fronts_table(view: SweepView, fronts: ModelFronts) -> str:
    """The measures of every arm's front."""
    rows = []
    for arm in fronts.arms:
        volume = NOTHING if arm.hypervolume is None else f"{arm.hypervolume:.4f}"
        counts = [f"{len(arm.points)}", f"{len(arm.front)}"]
        rows.append([_arm(view, arm.arm), *counts, volume, *map(escape, comparison_cells(arm))])
    reference = ""
    if fronts.reference is not None:
        of = "static settings" if fronts.static else "settings of all arms"
        high, low = fronts.reference
        reference = (
            f" Hypervolume: the area that the front dominates, up to ({high:.3f}, {low:.3f}), the "
            f"worst high- and low-resource loss of the {of}; more is better."
        )
    note = (
        "Dominated: no worse in both losses and better in one. Margin: at a point of the static "
        "front, how much lower the arm’s low-resource loss is at no higher high-resource loss; "
        f"least and most over these points.{reference}"
    )
    head = page.head(
        ["arm", "settings", "on front", "hypervolume", "of static front<br>dominated",
         "of own front<br>dominated", "margin, nats"]
    )  # fmt: skip
    return page.table(head, rows, note)


def comparison_cells(arm: ArmFront) -> list[str]:
    """Share of the static front, part of the own front, and the least and the greatest margin."""
    against = arm.against_static
    if against is None:
        return [NOTHING] * 3
    return [
        f"{against.dominated} of {len(against.margins)} ({against.share:.0%})",
        f"{against.dominated_by} of {len(against.margins_of_static)}",
        _margin_range(arm),
    ]


def _margin_range(arm: ArmFront) -> str:
    margins = [] if arm.against_static is None else arm.against_static.margins
    nats = [margin.nats for margin in margins if margin.nats is not None]
    if not nats:
        return NOTHING
    least = f"{min(nats):+.3f}" if len(nats) == len(margins) else "none"
    return f"{least} … {max(nats):+.3f}"


def settings_tables(view: SweepView, fronts: ModelFronts) -> str:
    """The points of the fronts, and folded away all the others."""
    on = [(arm, point) for arm in fronts.arms for point in arm.front]
    off = [
        (arm, point)
        for arm in fronts.arms
        for point in sorted(arm.points, key=lambda point: point.pair)
        if point not in arm.front
    ]
    note = (
        "Nats per token; high and low: means over the tasks of the group. Epochs: passes over the "
        "task’s training text until the step whose weights count."
    )
    if any(point.high.error is not None for _, point in on + off):
        note += " ± one standard error over the seeds."
    text = _settings(view, on, f"The settings on the fronts. {note}")
    if off:
        text += f"\n<details><summary>{len(off)} settings off the fronts</summary>\n"
        text += f"{_settings(view, off, note)}\n</details>"
    return text


def _settings(view: SweepView, rows: Sequence[tuple[ArmFront, Point]], note: str) -> str:
    sweep = view.record.sweep
    groups = [
        ("setting", ("mixture", "pre-training", "peak", "seeds")),
        ("loss", ("high", "low", *view.tasks)),
        ("epochs", sweep.low),
    ]
    cells = []
    for arm, point in rows:
        setting = point.setting
        share = NOTHING if setting.share is None else f"{100 * setting.share:g}%"
        cells.append(
            [
                _arm(view, arm.arm),
                escape(setting.mixture.label),
                share,
                f"{setting.peak:g}",
                str(len(point.runs)),
                _bold(point.high),
                _bold(point.low),
                *(f"{point.losses[task].mean:.3f}" for task in view.tasks),
                *(f"{_epochs(view, point, task):.1f}" for task in sweep.low),
            ]
        )
    return page.table(page.grouped_head("arm", groups), cells, note)


def _epochs(view: SweepView, point: Point, task: str) -> float:
    """The mean over the seeds."""
    values = []
    for trial, outcome in point.runs:
        run = view.curves[trial.name]
        values.append(run.epochs[task][run.at(outcome.step)])
    return sum(values) / len(values)


def overfitting_table(view: SweepView, fronts: ModelFronts) -> str:
    """How far the loss of each low-resource task has risen above its lowest."""
    rows = [_overfit_row(view, row) for row in overfits(fronts, view.curves, view.record.sweep.low)]
    head = page.head(
        ["arm", "mixture", "peak", "task", "lowest", "at step", "at the end", "risen by", "epochs"]
    )
    note = (
        "Validation loss, nats per token, of the arms of one phase: every mixture at its best "
        f"peak. ⚠ risen by more than {RISING_NATS:g} nats. Epochs: to the end."
    )
    return page.table(head, rows, note)


def _overfit_row(view: SweepView, row: Overfit) -> list[str]:
    setting = row.point.setting
    rises = row.risen > RISING_NATS
    risen = f'<b class="warning">{row.risen:.3f} ⚠</b>' if rises else f"{row.risen:.3f}"
    return [
        _arm(view, setting.arm), escape(setting.mixture.label), f"{setting.peak:g}",
        escape(row.task), f"{row.best:.3f}", f"{row.best_step:,}", f"{row.end:.3f}", risen,
        f"{row.epochs:.1f}",
    ]  # fmt: skip


def first_stage_table(view: SweepView) -> str:
    """Which peak every first stage goes on with; nothing where there is no first stage."""
    stages = first_stages(view.record)
    if not stages:
        return ""
    peaks = sorted({peak for stage in stages for peak in stage.losses})
    several = len(view.fronts) > 1
    rows = []
    for stage in stages:
        setting = stage.setting
        losses = [_taken(stage.losses.get(peak), peak in stage.taken) for peak in peaks]
        model = [escape(setting.model or NOTHING)] if several else []
        length = NOTHING if setting.share is None else f"{100 * setting.share:g}%"
        rows.append(
            [escape(setting.arm), *model, length, escape(setting.mixture.label), *losses,
             escape(stage.reason)]
        )  # fmt: skip
    head = page.head(
        ["first stage", *(["model"] if several else []), "length", "mixture",
         *(f"peak {peak:g}" for peak in peaks), "goes on with"]
    )  # fmt: skip
    note = (
        "Loss at the end of the first stage, nats per token, by peak: the mean over the groups of "
        "tasks that it trains on. Bold: what the second phases go on from."
    )
    return page.table(head, rows, note)


def _taken(loss: SeedMean | None, taken: bool) -> str:
    if loss is None:
        return NOTHING
    return _bold(loss) if taken else _loss(loss)


def _arm(view: SweepView, arm: str) -> str:
    colour = page.css_colour(view.look[arm][0])
    return f'<span class="swatch" style="background: {colour}"></span>{escape(arm)}'


def _loss(loss: SeedMean) -> str:
    error = "" if loss.error is None else f" <small>± {loss.error:.3f}</small>"
    return f"{loss.mean:.3f}{error}"


def _bold(loss: SeedMean) -> str:
    error = "" if loss.error is None else f" <small>± {loss.error:.3f}</small>"
    return f"<b>{loss.mean:.3f}</b>{error}"
