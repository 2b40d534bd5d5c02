"""The numbers that a sweep's figures show, as drawn, for tables. Losses in nats per token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from megaphase.report.numbers import Row
from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.pareto.choice_lines import (
    ChoiceLines,
    Fixed,
    pretraining_lines,
    steps_of,
)
from megaphase.sweep.pareto.curve_figures import (
    convergence_lines,
    efficiency_lines,
    epochs_before_last_phase,
    fall_at_the_end,
)
from megaphase.sweep.pareto.figures import (
    bleu_panels,
    lines_of_models,
    loss_panels,
    training_panels,
)
from megaphase.sweep.pareto.labels import peaks_label
from megaphase.sweep.pareto.seed_noise import drawn_losses
from megaphase.sweep.pareto.setting_columns import SETTING, setting_cells
from megaphase.sweep.pareto.trade_off import Panel, outside_marks
from megaphase.sweep.pareto.view import SweepView

NAMED = (*SETTING, "setting", "peaks")
LOSSES = ("high", "high_interval", "low", "low_interval")
Table = tuple[Sequence[str], Iterator[Row]]


def figure_tables(view: SweepView) -> Mapping[str, Table]:
    """Return columns and rows of every table by name.

    Intervals are half widths, of 95 % intervals of Student's t without the shifts of the seeds.
    """
    return {
        "trade_offs": (
            ["figure", *NAMED, *LOSSES, "on_front", "outside"],
            _trade_offs(view),
        ),
        "choices": (
            ["figure", *NAMED, "place", "first_steps", "last_steps", "steps", "line", *LOSSES],
            _choices(view),
        ),
        "over_tokens": (
            [*NAMED, "step", "low_tokens", "validation_loss", "training_loss"],
            _over_tokens(view),
        ),
        "convergence": (
            [*NAMED, "step", "high_epochs", "validation_loss", "epochs_before_last_phase",
             "fall_at_the_end"],
            _convergence(view),
        ),
    }  # fmt: skip


def _cells(setting: TriedSetting) -> list[object]:
    return [*setting_cells(setting), setting.label, peaks_label(setting.peaks)]


def _trade_offs(view: SweepView) -> Iterator[Row]:
    figures = {
        "front": loss_panels(view),
        "training_front": training_panels(view),
        "bleu_front": bleu_panels(view),
    }
    for name, panels in figures.items():
        for panel in panels:
            yield from _panel(name, panel)


def _panel(name: str, panel: Panel) -> Iterator[Row]:
    outside = {id(mark) for mark in outside_marks(panel)}
    for mark in panel.marks:
        losses = (mark.x.mean, mark.x.half_width, mark.y.mean, mark.y.half_width)
        yield [name, *_cells(mark.setting), *losses, mark.on_front, id(mark) in outside]


def _choices(view: SweepView) -> Iterator[Row]:
    losses = {
        setting: each
        for fronts in view.fronts
        for setting, each in drawn_losses(fronts.points).items()
    }
    figures: list[tuple[str, ChoiceLines]] = [
        (f"pre-training, {fixed} fixed", pretraining_lines(fronts.points, fixed))
        for fronts in view.fronts
        for fixed in get_args(Fixed)
    ]
    if len(view.fronts) > 1:
        figures.append(("models", lines_of_models(view)))
    for name, lines in figures:
        drawn = [(i, x, point) for i, line in enumerate(lines.lines) for x, point in line.points]
        for line, x, point in [*drawn, *((None, x, point) for x, point in lines.lone)]:
            steps, shown = steps_of(point), losses[point.setting]
            yield [
                name, *_cells(point.setting), x, steps[0], steps[-1], sum(steps), line,
                shown.high.mean, shown.high.half_width, shown.low.mean, shown.low.half_width,
            ]  # fmt: skip


def _over_tokens(view: SweepView) -> Iterator[Row]:
    for fronts in view.fronts:
        for line in efficiency_lines(view, fronts):
            columns = (line.steps, line.tokens, line.validation, line.training)
            for row in zip(*(each.tolist() for each in columns), strict=True):
                yield [*_cells(line.point.setting), *row]


def _convergence(view: SweepView) -> Iterator[Row]:
    for fronts in view.fronts:
        for line in convergence_lines(view, fronts):
            end = epochs_before_last_phase(view, line), fall_at_the_end(view, line)
            columns = (line.steps, line.epochs, line.validation)
            for row in zip(*(each.tolist() for each in columns), strict=True):
                yield [*_cells(line.point.setting), *row, *end]
