"""The plots of a sweep's page, with captions that explain what to look for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from megaphase.report.page import Plot
from megaphase.sweep.arms.config import Kind
from megaphase.sweep.pareto.choice_plots import Line, Score, choice_plot, score_plot
from megaphase.sweep.pareto.curve_plots import (
    data_efficiency_plot,
    overfitting_plot,
    task_curves_plot,
)
from megaphase.sweep.pareto.fronts import ArmFront, ModelFronts
from megaphase.sweep.pareto.overfit import best_by_mixture, single_stage_points
from megaphase.sweep.pareto.points import Point
from megaphase.sweep.pareto.statistics import Estimate, estimate
from megaphase.sweep.pareto.trade_off import Mark, Panel, outside, trade_off_plot
from megaphase.sweep.pareto.view import SweepView

LOSS_AXES = ("high-resource loss (nats per token)", "low-resource loss (nats per token)")
BLEU_AXES = ("BLEU, high-resource", "BLEU, low-resource")
COMPARED: tuple[Kind, ...] = ("static", "two-phase")
STEEP = "The steep beginning may be cut off at the top."


def front_plot(view: SweepView) -> Plot:
    """The trade-off fronts, a panel per model."""
    panels = [_loss_panel(fronts) for fronts in view.fronts]
    errors = "Bars: one standard error over the seeds. " if _has_errors(view) else ""
    caption = (
        "Lower left is better. Solid: the settings that no other of the same arm dominates, with "
        "a line around the area that they dominate; faint: its other settings. A point outside the "
        f"grey area is beyond every static mixture. {errors}{_outside_sentence(panels)}"
    )
    return Plot(
        "front",
        "Trade-off fronts",
        caption,
        partial(trade_off_plot, panels, view.styles, LOSS_AXES),
    )


def overfitting_figure(view: SweepView, fronts: ModelFronts) -> Plot | None:
    """Plot training against validation loss of the single-phase arms."""
    points = single_stage_points(fronts)
    if not points:
        return None
    return Plot(
        _named("overfitting", fronts),
        "Low-resource training and validation loss",
        "Where the two separate, the model memorizes its few texts: see how far the solid "
        "line rises from its lowest point (circle) while the dashed one keeps falling. One panel "
        f"per mixture, at its best peak. {STEEP}",
        partial(overfitting_plot, points, view.curves, view.record.sweep.low, view.styles),
    )


def other_figures(view: SweepView, fronts: ModelFronts) -> Iterator[Plot]:
    """Yield a model's plots of curves, data efficiency, pre-training length and scores, if any."""
    best = view.best_points(fronts)
    if not best:
        return
    yield Plot(
        _named("losses", fronts),
        "Validation loss per task, the best setting of each arm",
        "Best: the lowest mean of high- and low-resource loss. Dashed: where a second phase "
        f"begins; compare its gain on the low-resource tasks with its cost on the others. {STEEP}",
        partial(task_curves_plot, best, view.curves, view.tasks, view.styles),
    )
    compared = [
        point for arm in fronts.arms if arm.kind in COMPARED for point in _of_best_share(arm)
    ]
    if compared:
        yield Plot(
            _named("data_efficiency", fronts),
            "Data efficiency",
            "Low-resource loss against the low-resource tokens seen so far, one line per mixture: "
            "at the same number of tokens, the lower line has learned more from them; a line that "
            "turns up has seen them too often.",
            partial(
                data_efficiency_plot, compared, view.curves, view.record.sweep.low, view.styles
            ),
        )
    lines = list(_share_lines(fronts))
    if lines:
        shares = sorted({share for line in lines for share, _ in line.points})
        yield Plot(
            _named("pretraining", fronts),
            "Pre-training length and final losses",
            "One line per mixture of the second phase, each point at its best peak: look for the "
            "length beyond which the low-resource loss rises faster than the high-resource falls.",
            partial(
                choice_plot,
                lines,
                "pre-training, share of the budget",
                {share: f"{100 * share:g}%" for share in shares},
                view.styles,
            ),
        )
    scores = _scores(view, best)
    if scores["BLEU"]:
        yield Plot(
            _named("translation", fronts),
            "Translations of held-out sources, the best setting of each arm",
            "BLEU and chrF, 0 to 100; higher is better. Best: by losses, as above.",
            partial(score_plot, scores, view.styles),
        )


def bleu_front_plot(view: SweepView) -> Plot | None:
    """Plot the fronts in BLEU, of points whose outcomes all have scores for both groups."""
    panels = [_bleu_panel(view, fronts) for fronts in view.fronts]
    if not any(panel.marks for panel in panels):
        return None
    return Plot(
        "bleu_front",
        "Trade-off fronts in BLEU",
        "Upper right is better; otherwise like the fronts of losses. " + _outside_sentence(panels),
        partial(trade_off_plot, panels, view.styles, BLEU_AXES),
    )


def models_plot(view: SweepView) -> Plot | None:
    """Plot final losses over the models, in the order of the sweep file."""
    if len(view.fronts) < 2:
        return None
    places = {float(i): str(fronts.model) for i, fronts in enumerate(view.fronts)}
    lines = []
    for i, arm in enumerate(view.record.sweep.config.arms):
        best = [(x, view.best(view.fronts[int(x)].arms[i])) for x in places]
        points = [(x, point) for x, point in best if point is not None]
        if points:
            lines.append(Line(arm, "", points))
    if not lines:
        return None
    return Plot(
        "models",
        "Models and final losses",
        "The best setting of each arm with each model: see whether the arms come closer "
        "together or move apart.",
        partial(choice_plot, lines, "model", places, view.styles),
    )


def _named(name: str, fronts: ModelFronts) -> str:
    return name if fronts.model is None else f"{name}-{fronts.model}"


def _loss_panel(fronts: ModelFronts) -> Panel:
    marks = [
        Mark(
            arm.arm,
            _label(point, arm),
            point.high,
            point.low,
            arm.kind in COMPARED,
        )
        for arm in fronts.arms
        for point in arm.points
    ]
    return Panel(fronts.model or "", marks, _static_arms(fronts))


def _static_arms(fronts: ModelFronts) -> frozenset[str]:
    return frozenset(arm.arm for arm in fronts.arms if arm.kind == "static")


def _label(point: Point, arm: ArmFront) -> str:
    """Return the mixture, and the pre-training length if the arm has several."""
    shares = {each.setting.share for each in arm.points}
    return point.setting.label if len(shares) > 1 else point.setting.mixture.label


def _bleu_panel(view: SweepView, fronts: ModelFronts) -> Panel:
    sweep = view.record.sweep
    marks = []
    for arm in fronts.arms:
        for point in arm.points:
            high, low = (_bleu(point, group) for group in (sweep.high, sweep.low))
            if high is not None and low is not None:
                marks.append(Mark(arm.arm, _label(point, arm), high, low, arm.kind in COMPARED))
    return Panel(fronts.model or "", marks, _static_arms(fronts), higher_is_better=True)


def _bleu(point: Point, group: Sequence[str]) -> Estimate | None:
    """Return the mean over the translated tasks of a group."""
    by_seed = [
        [outcome.translation[task].bleu for task in group if task in outcome.translation]
        for _, outcome in point.runs
    ]
    if not all(by_seed):
        return None
    return estimate([sum(scores) / len(scores) for scores in by_seed])


def _scores(view: SweepView, best: Sequence[Point]) -> dict[str, list[Score]]:
    found: dict[str, list[Score]] = {"BLEU": [], "chrF": []}
    for point in best:
        for task in view.tasks:
            scores = [outcome.translation.get(task) for _, outcome in point.runs]
            known = [score for score in scores if score is not None]
            if known:
                arm = point.setting.arm
                found["BLEU"].append(Score(task, arm, estimate([each.bleu for each in known])))
                found["chrF"].append(Score(task, arm, estimate([each.chrf for each in known])))
    return found


def _of_best_share(arm: ArmFront) -> list[Point]:
    """Return, for every mixture, the best peak with the pre-training length of the best point."""
    points = best_by_mixture(arm.points)
    share = min(points, key=lambda point: point.chosen_by.mean).setting.share if points else None
    return [point for point in points if point.setting.share == share]


def _share_lines(fronts: ModelFronts) -> Iterator[Line]:
    """Yield a line per mixture for each arm with several pre-training lengths."""
    for arm in fronts.arms:
        by_mixture: dict[str, list[tuple[float, Point]]] = {}
        for point in best_by_mixture(arm.points):
            if point.setting.share is not None:
                label = point.setting.mixture.label
                by_mixture.setdefault(label, []).append((point.setting.share, point))
        if len({share for points in by_mixture.values() for share, _ in points}) < 2:
            continue
        for label, points in by_mixture.items():
            yield Line(arm.arm, label, sorted(points, key=lambda each: each[0]))


def _has_errors(view: SweepView) -> bool:
    return any(point.high.error is not None for fronts in view.fronts for point in fronts.points)


def _outside_sentence(panels: Sequence[Panel]) -> str:
    """Return a sentence that lists the points outside the limits."""
    sentences = []
    for panel in panels:
        if not panel.marks:
            continue
        front, others = outside(panel)
        where = f"{panel.title}: " if panel.title else ""
        named = [
            f"{mark.arm} {mark.label} ({mark.x.mean:.2f}, {mark.y.mean:.2f})" for mark in front
        ]
        if others:
            settings = "setting" if others == 1 else "settings"
            named.append(f"{others} {settings} off the fronts")
        if named:
            sentences.append(where + ", ".join(named))
    return f"Outside the picture: {'; '.join(sentences)}." if sentences else ""
