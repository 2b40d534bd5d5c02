"""The tables of a sweep's page."""

from __future__ import annotations

from collections.abc import Sequence

from megaphase.report.losses import RISING_NATS
from megaphase.report.page import Cell, PageTable, css_colour
from megaphase.report.run_page import NOTHING
from megaphase.sweep.pareto.first_stages import first_stages
from megaphase.sweep.pareto.fronts import ArmFront, ModelFronts
from megaphase.sweep.pareto.labels import peaks_label
from megaphase.sweep.pareto.overfit import Overfit, overfits
from megaphase.sweep.pareto.points import Point
from megaphase.sweep.pareto.statistics import Estimate
from megaphase.sweep.pareto.verdict import MOST_MARGINS
from megaphase.sweep.pareto.view import SweepView


def fronts_table(view: SweepView, fronts: ModelFronts) -> PageTable:
    """Return the measures of every arm's front."""
    rows: list[list[str | Cell]] = []
    for arm in fronts.arms:
        volume = NOTHING if arm.hypervolume is None else f"{arm.hypervolume:.4f}"
        counts = [f"{len(arm.points)}", f"{len(arm.front)}"]
        compared = comparison_cells(arm) if fronts.is_compared else []
        rows.append([_arm(view, arm.arm), *counts, volume, *compared])
    notes = []
    if fronts.is_compared:
        notes.append(
            "Dominated: no worse in both losses and better in one. Margin: at a point of the "
            "static front, how much lower the arm’s low-resource loss is at no higher "
            "high-resource loss, below 0 if it is higher: at each of up to "
            f"{MOST_MARGINS} static points, from the lowest high-resource loss to the highest, "
            "otherwise least … median … most; none: the arm has no high-resource loss as low. Each "
            "is listed with its interval below. These describe the fronts; the verdict rests on "
            "the differences."
        )
    if fronts.reference is not None:
        of = "static settings" if fronts.static else "settings of all arms"
        high, low = fronts.reference
        notes.append(
            f"Hypervolume: the area that the front dominates, up to ({high:.3f}, {low:.3f}), the "
            f"worst high- and low-resource loss of the {of}; more is better."
        )
    compared = ["of static front\ndominated", "of own front\ndominated", "margin, nats"]
    columns = ["arm", "settings", "on front", "hypervolume"]
    return PageTable(columns + (compared if fronts.is_compared else []), rows, " ".join(notes))


def comparison_cells(arm: ArmFront) -> list[str]:
    """Return fraction of the static front, part of the own front, margins."""
    against = arm.against_static
    if against is None:
        return [NOTHING] * 3
    return [
        f"{against.dominated} of {len(against.margins)} ({against.share:.0%})",
        f"{against.dominated_by} of {len(against.margins_of_static)}",
        _margin_range(arm),
    ]


def _margin_range(arm: ArmFront) -> str:
    """Return the margin at each of a few static points, or the least, median and greatest one."""
    margins = [] if arm.against_static is None else arm.against_static.margins
    nats = [margin.nats for margin in margins]
    found = sorted(each for each in nats if each is not None)
    if not found:
        return "none"
    if len(nats) <= MOST_MARGINS:
        return ", ".join("none" if each is None else f"{each:+.3f}" for each in nats)
    least, median, most = found[0], found[(len(found) - 1) // 2], found[-1]
    shown = f"{least:+.3f} … {median:+.3f} … {most:+.3f}"
    missing = len(nats) - len(found)
    return f"{shown}; none at {missing}" if missing else shown


def settings_tables(view: SweepView, fronts: ModelFronts) -> tuple[PageTable, PageTable | None]:
    """Return the points of the fronts, and all the others, if there are any."""
    on = [(arm, point) for arm in fronts.arms for point in arm.front]
    off = [
        (arm, point)
        for arm in fronts.arms
        for point in sorted(arm.points, key=lambda point: point.pair)
        if point not in arm.front
    ]
    note = (
        f"Nats per token on the {view.split} split; high and low: means over the tasks of the "
        "group. A setting is on its arm’s front by its losses on the validation split. Epochs: "
        "passes over the task’s training text until the step whose weights count. Peaks: of the "
        "learning rate in every phase, first to last; one if they are equal."
    )
    if any(point.high.error is not None for _, point in on + off):
        note += (
            " ± 95 % interval from Student’s t over the seeds, of which part is common to all "
            "settings: compare settings by the differences above."
        )
    on_fronts = _settings(view, on, f"The settings on the fronts. {note}")
    return on_fronts, _settings(view, off, note) if off else None


def _settings(view: SweepView, rows: Sequence[tuple[ArmFront, Point]], note: str) -> PageTable:
    sweep = view.record.sweep
    groups = [
        ("setting", ("mixture", "pre-training", "peaks", "seeds")),
        ("loss", ("high", "low", *view.tasks)),
        ("epochs", sweep.low),
    ]
    cells: list[list[str | Cell]] = []
    for arm, point in rows:
        setting = point.setting
        share = NOTHING if setting.share is None else f"{100 * setting.share:g}%"
        cells.append(
            [
                _arm(view, arm.arm),
                setting.short_label,
                share,
                peaks_label(setting.peaks),
                str(len(point.runs)),
                _loss(point.high, bold=True),
                _loss(point.low, bold=True),
                *(f"{point.losses[task].mean:.3f}" for task in view.tasks),
                *(f"{_epochs(view, point, task):.1f}" for task in sweep.low),
            ]
        )
    return PageTable(["arm"], cells, note, groups)


def _epochs(view: SweepView, point: Point, task: str) -> float:
    """Return the mean over the seeds."""
    values = []
    for trial, outcome in point.runs:
        run = view.curves[trial.name]
        values.append(run.epochs[task][run.at(outcome.step)])
    return sum(values) / len(values)


def overfitting_table(view: SweepView, fronts: ModelFronts) -> PageTable:
    """Return how far the loss of each low-resource task has risen above its lowest."""
    rows = [_overfit_row(view, row) for row in overfits(fronts, view.curves, view.record.sweep.low)]
    columns = (
        *("arm", "mixture", "peak", "task"),
        *("lowest", "at step", "at the end", "risen by", "epochs"),
    )
    note = (
        "Validation loss, nats per token, of every setting of the arms of one phase. "
        f"⚠ risen by more than {RISING_NATS:g} nats in more than one epoch. Epochs: to the end."
    )
    return PageTable(columns, rows, note)


def _overfit_row(view: SweepView, row: Overfit) -> list[str | Cell]:
    setting = row.point.setting
    is_repeated = row.epochs > 1
    risen = Cell(f"{row.risen:.3f}", warning=is_repeated and row.risen > RISING_NATS)
    return [
        _arm(view, setting.arm), setting.short_label, f"{setting.peak:g}",
        row.task, f"{row.best:.3f}", f"{row.best_step:,}", f"{row.end:.3f}", risen,
        f"{row.epochs:.1f}",
    ]  # fmt: skip


def first_stage_table(view: SweepView) -> PageTable | None:
    """Return the peak chosen for every first stage; None if there is no first stage."""
    stages = first_stages(view.record)
    if not stages:
        return None
    peaks = sorted({peak for stage in stages for peak in stage.losses})
    several = len(view.fronts) > 1
    rows = []
    for stage in stages:
        setting = stage.setting
        losses = [_taken(stage.losses.get(peak), peak in stage.taken) for peak in peaks]
        model = [setting.model or NOTHING] if several else []
        length = NOTHING if setting.share is None else f"{100 * setting.share:g}%"
        rows.append([setting.arm, *model, length, setting.short_label, *losses, stage.reason])
    columns = [
        "first stage", *(["model"] if several else []), "length", "mixture",
        *(f"peak {peak:g}" for peak in peaks), "chosen peak",
    ]  # fmt: skip
    note = (
        "Loss at the end of the first stage on the validation split, nats per token, by peak: the "
        "mean over the groups of tasks that it trains on. Bold: the second phases start from these."
    )
    return PageTable(columns, rows, note)


def _taken(loss: Estimate | None, taken: bool) -> str | Cell:
    return NOTHING if loss is None else _loss(loss, bold=taken)


def _arm(view: SweepView, arm: str) -> Cell:
    return Cell(arm, colour=css_colour(view.styles[arm][0]))


def _loss(loss: Estimate, *, bold: bool) -> Cell:
    interval = "" if loss.half_width is None else f"± {loss.half_width:.3f}"
    return Cell(f"{loss.mean:.3f}", bold=bold, small=interval)
