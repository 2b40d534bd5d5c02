"""Write every number of a sweep's report as CSV tables. Losses in nats per token; no timings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megaphase.report.numbers import Row, write_table
from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.pareto.first_stages import first_stages
from megaphase.sweep.pareto.overfit import overfits
from megaphase.sweep.pareto.view import SweepView
from megaphase.sweep.trials import Trial

SETTING = ("arm", "model", "pretrain_share", "rate", "temperature", "peak")


def write_sweep_numbers(view: SweepView, folder: Path) -> list[str]:
    """Write the tables into the new folder; return the names of the files."""
    tasks, low = view.tasks, view.record.sweep.low
    per_run = ("loss", "bits_per_byte", "tokens", "epochs", "bleu", "chrf")
    of_group = [f"{group}{what}" for group in ("high", "low", *tasks) for what in ("", "_error")]
    comparison = (
        "static_points", "dominated", "dominated_share", "own_dominated_by_static",
        "least_margin", "most_margin",
    )  # fmt: skip
    tables = {
        "runs": (
            ["run", "seed", *SETTING, "ended", "failed", "step", "high", "low",
             *(f"{what}_{task}" for what in per_run for task in tasks)],
            _runs(view),
        ),
        "settings": ([*SETTING, "seeds", *of_group, "on_front", "best_of_arm"], _settings(view)),
        "fronts": (
            ["model", "arm", "kind", "settings", "front_points", "hypervolume", "reference_high",
             "reference_low", *comparison, "verdict"],
            _fronts(view),
        ),
        "margins": (
            [*(f"static_{name}" for name in SETTING), "static_high", "static_low", "other_arm",
             *(f"other_{name}" for name in SETTING[2:]), "other_high", "other_low", "margin",
             "margin_error"],
            _margins(view),
        ),
        "overfitting": (
            [*SETTING, "task", "lowest", "lowest_step", "end", "risen", "epochs"],
            (
                [*_setting(row.point.setting), row.task, row.best, row.best_step, row.end,
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
    }  # fmt: skip
    folder.mkdir()
    return [
        write_table(folder / f"{name}.csv", columns, rows)
        for name, (columns, rows) in tables.items()
    ]


def _setting(setting: TriedSetting) -> list[object]:
    mixture = setting.mixture
    return [
        setting.arm, setting.model, setting.share, mixture.rate, mixture.temperature, setting.peak
    ]  # fmt: skip


def _runs(view: SweepView) -> Iterator[Row]:
    for trial in view.record.trials:
        if trial.is_final:
            yield [trial.name, trial.seed, *_setting(trial.setting), *_outcome(view, trial)]


def _outcome(view: SweepView, trial: Trial) -> Iterator[object]:
    sweep, outcome = view.record.sweep, view.record.outcomes.get(trial.name)
    yield outcome is not None
    if outcome is None:
        return
    yield from (outcome.failed, outcome.step)
    if outcome.failed is not None:
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


def _settings(view: SweepView) -> Iterator[Row]:
    for fronts in view.fronts:
        for arm in fronts.arms:
            best = view.best(arm)
            for point in arm.points:
                estimates = [point.high, point.low, *(point.losses[task] for task in view.tasks)]
                yield [
                    *_setting(point.setting),
                    len(point.runs),
                    *(value for each in estimates for value in (each.mean, each.error)),
                    point in arm.front,
                    point is best,
                ]


def _fronts(view: SweepView) -> Iterator[Row]:
    sentences = {(verdict.model, verdict.arm): verdict.outcome for verdict in view.verdicts}
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
                static = [*_setting(margin.point.setting), *margin.point.pair, arm.arm]
                if other is None:
                    yield static
                    continue
                setting = _setting(other.setting)[2:]
                yield [
                    *static,
                    *setting,
                    *other.pair,
                    margin.nats,
                    margin.estimate and margin.estimate.error,
                ]


def _curves(view: SweepView) -> Iterator[Row]:
    for name, run in view.curves.items():
        for i, step in enumerate(run.steps):
            for task in view.tasks:
                values = (run.validation, run.training, run.tokens, run.epochs)
                yield [name, step, task, *(by_task[task][i] for by_task in values)]


def _first_stages(view: SweepView) -> Iterator[Row]:
    for stage in first_stages(view.record):
        setting = _setting(stage.setting)[:-1]
        for peak, loss in stage.losses.items():
            mean, error = (None, None) if loss is None else (loss.mean, loss.error)
            yield [*setting, peak, mean, error, peak in stage.taken]
