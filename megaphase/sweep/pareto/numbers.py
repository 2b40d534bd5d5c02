"""Write every number of a sweep's report as CSV tables. Losses in nats per token; no timings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megaphase.report.numbers import Row, write_table
from megaphase.sweep.pareto.figure_numbers import figure_tables
from megaphase.sweep.pareto.first_stages import first_stages
from megaphase.sweep.pareto.overfit import overfits
from megaphase.sweep.pareto.setting_columns import SETTING, setting_cells
from megaphase.sweep.pareto.statistics import Estimate
from megaphase.sweep.pareto.tokens_to_loss import reaches
from megaphase.sweep.pareto.verdict_tables import adjusted_p
from megaphase.sweep.pareto.view import SweepView
from megaphase.sweep.sweep import GROUP_LOSSES
from megaphase.sweep.trials import Trial

STATISTICS = ("from", "to", "seeds", "t", "p")  # of an interval and of a test


def write_sweep_numbers(view: SweepView, folder: Path) -> list[str]:
    """Write the tables into the new folder; return the names of the files."""
    tasks, low = view.tasks, view.record.sweep.low
    per_run = ("loss", "bits_per_byte", "tokens", "epochs", "bleu", "chrf")
    groups, axes = ("high", "low", *tasks), other_axes(view)
    of_group = [f"{group}{what}" for group in groups for what in ("", "_error")]
    ends = [f"{group}{what}" for group in groups for what in ("_from", "_to")]
    comparison = (
        "static_points", "dominated", "dominated_share", "own_dominated_by_static",
        "least_margin", "most_margin",
    )  # fmt: skip
    tables = {
        "runs": (
            ["run", "seed", *SETTING, "ended", "failed", "step", "high", "low",
             *(f"{what}_{task}" for what in per_run for task in tasks),
             *(f"{what}_{task}" for what in ("test", "test_bits_per_byte") for task in tasks),
             *axes],
            _runs(view, axes),
        ),
        "settings": (
            [*SETTING, "seeds", *of_group, "on_front", "best_of_arm", *ends, "split",
             "validation_high", "validation_low", "setting", "peaks", *axes],
            _settings(view, axes),
        ),
        "fronts": (
            ["model", "arm", "kind", "settings", "front_points", "hypervolume", "reference_high",
             "reference_low", *comparison, "verdict"],
            _fronts(view),
        ),
        "margins": (
            [*(f"static_{name}" for name in SETTING), "static_high", "static_low", "other_arm",
             *(f"other_{name}" for name in SETTING[2:]), "other_high", "other_low", "margin",
             "margin_error", *(f"margin_{name}" for name in STATISTICS)],
            _margins(view),
        ),
        "contrasts": (
            ["model", "arm", "against", "verdict", "k", "settings", "settings_against", "chance",
             "loss", "unit", "difference", "difference_error", *STATISTICS, "p_adjusted"],
            _contrasts(view),
        ),
        "tokens_to_loss": (
            [*SETTING, "level", "level_of", "tokens", "step", "best_of_arm", "setting"],
            _tokens_to_loss(view),
        ),
        "overfitting": (
            [*SETTING, "task", "lowest", "lowest_step", "end", "risen", "epochs"],
            (
                [*setting_cells(row.point.setting), row.task, row.best, row.best_step, row.end,
                 row.risen, row.epochs]
                for fronts in view.fronts
                for row in overfits(fronts, view.curves, low)
            ),
        ),
        "curves": (
            ["run", "step", "task", "validation_loss", "training_loss", "tokens", "epochs"],
            _curves(view),
        ),
        "first_stages": ([*SETTING, "loss", "loss_error", "goes_on"], _first_stages(view)),
        **figure_tables(view),
    }  # fmt: skip
    if view.pruned:
        rows = (
            [*setting_cells(each.setting), each.step, each.setting.label] for each in view.pruned
        )
        tables["pruned"] = [*SETTING, "step", "setting"], rows
    folder.mkdir()
    return [
        write_table(folder / f"{name}.csv", columns, rows)
        for name, (columns, rows) in tables.items()
    ]


def other_axes(view: SweepView) -> list[str]:
    """Return the axes of all arms that have no column in SETTING."""
    settings = [trial.setting for trial in view.record.trials if trial.is_final]
    axes = dict.fromkeys(axis for setting in settings for axis, _ in setting.values)
    return [axis for axis in axes if axis not in SETTING]


def _statistics(found: Estimate | None) -> list[object]:
    if found is None:
        return [None] * len(STATISTICS)
    return [found.low, found.high, found.n, found.t, found.p]


def _runs(view: SweepView, axes: Sequence[str]) -> Iterator[Row]:
    columns = 3 + 2 + 8 * len(view.tasks)
    for trial in view.record.trials:
        if trial.is_final:
            outcome = list(_outcome(view, trial))
            outcome += [None] * (columns - len(outcome))
            values = [trial.setting.get(axis) for axis in axes]
            yield [trial.name, trial.seed, *setting_cells(trial.setting), *outcome, *values]


def _outcome(view: SweepView, trial: Trial) -> Iterator[object]:
    sweep, outcome = view.record.sweep, view.record.outcomes.get(trial.name)
    yield outcome is not None
    if outcome is None:
        return
    yield from (outcome.failed, outcome.step)
    if outcome.failed is not None or outcome.pruned is not None:
        return
    yield from (outcome.group_loss(group) for group in (sweep.high, sweep.low))
    yield from (outcome.losses[task] for task in view.tasks)
    yield from (outcome.bits_per_byte.get(task) for task in view.tasks)
    curves = view.curves.get(trial.name)
    for by_task in (None, None) if curves is None else (curves.tokens, curves.epochs):
        at = 0 if curves is None else curves.at(outcome.step)
        yield from (None if by_task is None else by_task[task][at] for task in view.tasks)
    scores = [outcome.translation.get(task) for task in view.tasks]
    yield from (None if score is None else score.bleu for score in scores)
    yield from (None if score is None else score.chrf for score in scores)
    for test in (outcome.test, outcome.test_bits_per_byte):
        yield from (test.get(task) for task in view.tasks)


def _settings(view: SweepView, axes: Sequence[str]) -> Iterator[Row]:
    for fronts in view.fronts:
        for arm in fronts.arms:
            best = view.best(arm)
            for point in arm.points:
                estimates = [point.high, point.low, *(point.losses[task] for task in view.tasks)]
                yield [
                    *setting_cells(point.setting),
                    len(point.runs),
                    *(value for each in estimates for value in (each.mean, each.error)),
                    point in arm.front,
                    point is best,
                    *(value for each in estimates for value in (each.low, each.high)),
                    view.split,
                    point.chosen_by.high,
                    point.chosen_by.low,
                    point.setting.label,
                    " ".join(f"{peak:g}" for peak in point.setting.peaks),
                    *(point.setting.get(axis) for axis in axes),
                ]


def _fronts(view: SweepView) -> Iterator[Row]:
    sentences = {
        (verdict.model, verdict.arm): verdict.outcome
        for verdict in view.verdicts
        if not verdict.is_primary
    }
    for fronts in view.fronts:
        for arm in fronts.arms:
            row: list[object] = [fronts.model, arm.arm, arm.kind, len(arm.points), len(arm.front)]
            row += [arm.hypervolume, *(fronts.reference or (None, None))]
            against = arm.against_static
            if against is None:
                row += [None] * 6
            else:
                nats = [margin.nats for margin in against.margins if margin.nats is not None]
                row += [
                    len(against.margins), against.dominated, against.share, against.dominated_by,
                    min(nats, default=None), max(nats, default=None),
                ]  # fmt: skip
            yield [*row, sentences.get((fronts.model, arm.arm))]


def _margins(view: SweepView) -> Iterator[Row]:
    for fronts in view.fronts:
        for arm in fronts.arms:
            for margin in arm.against_static.margins if arm.against_static else ():
                other = margin.other
                static = [*setting_cells(margin.point.setting), *margin.point.pair, arm.arm]
                if other is None:
                    yield static
                    continue
                setting, found = setting_cells(other.setting)[2:], margin.estimate
                yield [
                    *static,
                    *setting,
                    *other.pair,
                    margin.nats,
                    None if found is None else found.error,
                    *_statistics(found),
                ]


def _contrasts(view: SweepView) -> Iterator[Row]:
    for each, adjusted in zip(view.contrasts, adjusted_p(view.contrasts), strict=True):
        head = [
            each.model,
            each.arm,
            each.against,
            each.result,
            each.k,
            *each.settings,
            each.chance,
        ]
        differences = {"nats_per_token": each.nats}
        if each.bits is not None:
            differences["bits_per_byte"] = each.bits
        for unit, found in differences.items():
            for loss in (*GROUP_LOSSES, *view.tasks):
                difference = found.of(loss)
                is_tested = found is each.nats and loss == "mean"
                yield [
                    *head, loss, unit, difference.mean, difference.error,
                    *_statistics(difference), adjusted if is_tested else None,
                ]  # fmt: skip
        for loss, other in {
            "mean, best of all settings": each.best_of_all,
            "mean, validation split": each.on_validation,
        }.items():
            yield [
                *head, loss, "nats_per_token", other.mean, other.error, *_statistics(other), None,
            ]  # fmt: skip


def _tokens_to_loss(view: SweepView) -> Iterator[Row]:
    for fronts in view.fronts:
        best = view.best_points(fronts)
        for each in reaches(fronts, view.curves, view.record.sweep.low):
            setting = each.point.setting
            yield [
                *setting_cells(setting), each.level.loss, each.level.arm,
                *(each.reached or (None, None)), each.point in best, setting.label,
            ]  # fmt: skip


def _curves(view: SweepView) -> Iterator[Row]:
    for name, run in view.curves.items():
        for i, step in enumerate(run.steps):
            for task in view.tasks:
                values = (run.validation, run.training, run.tokens, run.epochs)
                yield [name, step, task, *(by_task[task][i] for by_task in values)]


def _first_stages(view: SweepView) -> Iterator[Row]:
    for stage in first_stages(view.record):
        setting = setting_cells(stage.setting)[:-1]
        for peak, loss in stage.losses.items():
            mean, error = (None, None) if loss is None else (loss.mean, loss.error)
            yield [*setting, peak, mean, error, peak in stage.taken]
