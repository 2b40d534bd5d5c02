"""The tables of a sweep's page on which its verdict rests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaphase.report.page import Cell, PageTable, css_colour
from megaphase.report.run_page import NOTHING
from megaphase.sweep.pareto.contrasts import Contrast
from megaphase.sweep.pareto.fronts import Margin, ModelFronts
from megaphase.sweep.pareto.labels import peaks_label
from megaphase.sweep.pareto.points import Point
from megaphase.sweep.pareto.statistics import Estimate, holm
from megaphase.sweep.pareto.tokens_to_loss import Reached, SettingReach, levels_of, reaches
from megaphase.sweep.pareto.view import SweepView


def adjusted_p(contrasts: Sequence[Contrast]) -> list[float | None]:
    """Return p of the differences in the mean loss, adjusted for all of the report; two baselines
    have two contrasts, but one difference."""
    found = {_pair(each): each.nats.mean.p for each in contrasts if each.nats.mean.p is not None}
    adjusted = dict(zip(found, holm(list(found.values())), strict=True))
    return [adjusted.get(_pair(each)) for each in contrasts]


def _pair(contrast: Contrast) -> tuple[str | None, frozenset[str]]:
    return contrast.model, frozenset((contrast.arm, contrast.against))


@dataclass(frozen=True)
class ContrastTables:
    """The differences between arms and baselines: in the mean, and by group and task."""

    means: PageTable
    tasks: PageTable


def contrast_tables(view: SweepView, fronts: ModelFronts) -> ContrastTables | None:
    """Return the differences between the arms and the baselines; None if there are none."""
    pairs = [
        (contrast, adjusted)
        for contrast, adjusted in zip(view.contrasts, adjusted_p(view.contrasts), strict=True)
        if contrast.model == fronts.model
    ]
    if not pairs:
        return None
    means = _means_table(view, pairs)
    tasks_note = "The same differences by group and task, nats per token; bold: without 0."
    tasks = PageTable(
        ["arm", "with", "high", "low", *view.tasks],
        [_task_row(view, contrast) for contrast, _ in pairs],
        tasks_note,
    )
    return ContrastTables(means, tasks)


def _means_table(view: SweepView, pairs: Sequence[tuple[Contrast, float | None]]) -> PageTable:
    """Return the differences in the mean loss, without columns that would repeat another."""
    also = {
        "best of all, nats": any(c.settings != (c.k, c.k) for c, _ in pairs),
        "validation split, nats": view.split == "test",
    }
    columns = [
        "arm", "with", "verdict", "nats per token", "p", "bits per byte",
        *(name for name, is_shown in also.items() if is_shown), "p, adj.", "settings",
    ]  # fmt: skip
    rows = [_mean_row(view, contrast, adjusted, columns) for contrast, adjusted in pairs]
    count = len({_pair(each) for each in view.contrasts})
    note = (
        "Mean of high- and low-resource loss of the arm minus that of the other, seed by seed: "
        "below 0 the arm is better. Of as many random settings of each arm as the smaller one has "
        "(best of all: of all settings, which favours the arm with more of them), the one with the "
        "lowest mean loss on the validation split is chosen; its expected losses on the "
        f"{view.split} split are compared. [95 % interval] from Student’s t over the seeds; bold: "
        f"without 0. p, adj.: adjusted after Holm for the {count} "
        f"{'pair' if count == 1 else 'pairs'} of arms of this report. Wins or loses: every "
        "interval of the row (on the validation split the mean) is on the same side of 0, and that "
        "of no task is on the other."
    )
    return PageTable(columns, rows, note)


def _mean_row(
    view: SweepView, contrast: Contrast, adjusted: float | None, columns: Sequence[str]
) -> list[str | Cell]:
    own, other = contrast.settings
    of = "" if own == other == contrast.k else f"of {own}, {other}"
    mean, bits, is_decided = contrast.nats.mean, contrast.bits, contrast.result != "undecided"
    also = {
        "best of all, nats": contrast.best_of_all,
        "validation split, nats": contrast.on_validation,
    }
    return [
        _arm(view, contrast.arm), contrast.against, Cell(contrast.result, bold=is_decided),
        _difference(mean), _p(mean.p), NOTHING if bits is None else _difference(bits.mean),
        *(_difference(found) for name, found in also.items() if name in columns),
        _p(adjusted), Cell(str(contrast.k), small=of),
    ]  # fmt: skip


def _task_row(view: SweepView, contrast: Contrast) -> list[str | Cell]:
    found = [contrast.nats.of(loss) for loss in ("high", "low")]
    found += [contrast.nats.tasks[task] for task in view.tasks]
    return [_arm(view, contrast.arm), contrast.against, *map(_difference, found)]


def margins_table(view: SweepView, fronts: ModelFronts) -> PageTable | None:
    """Return the margins at every point of the static front; None if there are none."""
    rows = [
        _margin_row(view, arm.arm, margin)
        for arm in fronts.arms
        if arm.against_static is not None
        for margin in arm.against_static.margins
    ]
    if not rows:
        return None
    groups = [
        ("point of the static front", ("setting", "peaks", "high", "low")),
        ("arm’s point at no higher high loss", ("setting", "peaks", "high", "low")),
        ("margin in the low loss", ("nats", "p", "seeds")),
    ]
    note = (
        "How much lower the arm’s low-resource loss is, seed by seed. Points are matched on the "
        f"validation split and shown with their losses on the {view.split} split. [95 % interval] "
        "from Student’s t. These describe the fronts; every point of them was chosen for its "
        "losses, so no margin is a test."
    )
    return PageTable(["arm"], rows, note, groups)


def _margin_row(view: SweepView, arm: str, margin: Margin) -> list[str | Cell]:
    found = margin.estimate
    return [
        _arm(view, arm), *_point_cells(margin.point), *_point_cells(margin.other),
        NOTHING if found is None else _difference(found),
        NOTHING if found is None else _p(found.p),
        NOTHING if found is None else str(found.n),
    ]  # fmt: skip


def _point_cells(point: Point | None) -> list[str | Cell]:
    if point is None:
        return ["none", *[NOTHING] * 3]
    peaks = peaks_label(point.setting.peaks)
    return [point.setting.label, peaks, f"{point.high.mean:.3f}", f"{point.low.mean:.3f}"]


def tokens_table(view: SweepView, fronts: ModelFronts) -> PageTable | None:
    """Return the tokens at which each arm first reaches the losses of all arms' best settings."""
    levels, arms = levels_of(fronts), [arm for arm in fronts.arms if arm.points]
    if not levels:
        return None
    found = reaches(fronts, view.curves, view.record.sweep.low)
    rows: list[list[str | Cell]] = []
    for level in levels:
        at_level = [each for each in found if each.level == level]
        cells = [
            _reach_cell(
                [each for each in at_level if each.point.setting.arm == arm.arm], view.best(arm)
            )
            for arm in arms
        ]
        rows.append([Cell(f"{level.loss:.3f}", small=f"end of {level.arm}"), *cells])
    note = (
        "Low-resource training tokens, all tasks together, when the low-resource loss on the "
        "validation split (nats per token, mean over the seeds) is first at the level or below, "
        "interpolated between two validations; the same rule for all arms. For the best setting of "
        "each arm; in brackets: for that of its settings which needs fewest."
    )
    return PageTable(["low-resource loss", *(arm.arm for arm in arms)], rows, note)


def _reach_cell(reaches: Sequence[SettingReach], best: Point | None) -> str | Cell:
    own = next((each.reached for each in reaches if each.point is best), None)
    fewest = min((each.reached for each in reaches if each.reached is not None), default=None)
    if fewest is None:
        return "never"
    return Cell(_tokens(own), small="" if fewest == own else f"({_tokens(fewest)})")


def _tokens(reached: Reached | None) -> str:
    return "never" if reached is None else f"{reached.tokens:,.0f}"


def _difference(found: Estimate) -> Cell:
    interval = "" if found.low is None else f"[{found.low:+.3f}, {found.high:+.3f}]"
    return Cell(f"{found.mean:+.3f}", bold=found.sign != 0, small=interval)


def _p(p: float | None) -> str:
    return NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _arm(view: SweepView, arm: str) -> Cell:
    return Cell(arm, colour=css_colour(view.styles[arm][0]))
