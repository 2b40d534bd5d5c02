"""The plots of a sweep's page over settings, with captions that explain what to look for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean

from megaphase.report.page import Plot
from megaphase.sweep.arms.config import Kind
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.pareto.choice_lines import ChoiceLines, Fixed, model_lines, pretraining_lines
from megaphase.sweep.pareto.choice_plots import Score, choice_plot, score_plot
from megaphase.sweep.pareto.fronts import ModelFronts
from megaphase.sweep.pareto.labels import SettingLabels
from megaphase.sweep.pareto.measures import nondominated
from megaphase.sweep.pareto.points import Point, reported_split
from megaphase.sweep.pareto.seed_noise import drawn_losses, error_sentence, without_shared_shift
from megaphase.sweep.pareto.trade_off import Mark, Panel, outside, trade_off_plot
from megaphase.sweep.pareto.view import SweepView

LOSS_AXES = ("high-resource loss (nats per token)", "low-resource loss (nats per token)")
TRAINING_AXES = ("high-resource training loss", "low-resource training loss")
BLEU_AXES = ("BLEU, high-resource", "BLEU, low-resource")
COMPARED: tuple[Kind, ...] = ("static", "two-phase")
Group = Sequence[str]


def labels_of(view: SweepView) -> SettingLabels:
    """Return the names of the sweep's settings in plots."""
    points = [point for fronts in view.fronts for point in fronts.points]
    return SettingLabels.of(view.record.sweep, points)


def front_plot(view: SweepView) -> Plot:
    """The trade-off fronts, a panel per model."""
    panels = loss_panels(view)
    split = reported_split(view.record)
    by = ", which is chosen by the validation losses," if split == "test" else ""
    caption = (
        f"Losses on the {split} split; lower left is better. Solid: the settings on the front of "
        f"their arm{by} with a dashed line around the area that they dominate; faint: its "
        "other settings. A point outside the grey area is beyond every static mixture. "
        f"{_about(view)}{outside_sentence(panels)}"
    )
    return Plot(
        "front",
        "Trade-off fronts",
        caption,
        partial(trade_off_plot, panels, view.styles, LOSS_AXES),
    )


def training_front_plot(view: SweepView) -> Plot | None:
    """Plot the fronts of the losses on training documents, of points for which all are known."""
    panels = training_panels(view)
    if not any(panel.marks for panel in panels):
        return None
    caption = (
        "Losses of the same weights, nats per token, on a sample of their training documents; "
        "lower left is better. An arm that is behind here and ahead above generalizes better than "
        f"it fits; one that is ahead here and behind above has memorized. {_about(view)}"
        f"{outside_sentence(panels)}"
    )
    return Plot(
        "training_front",
        "Trade-off fronts on the training set",
        caption,
        partial(trade_off_plot, panels, view.styles, TRAINING_AXES),
    )


def bleu_front_plot(view: SweepView) -> Plot | None:
    """Plot the fronts in BLEU, of points whose outcomes all have scores for both groups."""
    panels = bleu_panels(view)
    if not any(panel.marks for panel in panels):
        return None
    return Plot(
        "bleu_front",
        "Trade-off fronts in BLEU",
        "Upper right is better; otherwise like the fronts of losses. " + outside_sentence(panels),
        partial(trade_off_plot, panels, view.styles, BLEU_AXES),
    )


def models_plot(view: SweepView) -> Plot | None:
    """Plot final losses over the models, in the order of the sweep file."""
    if len(view.fronts) < 2:
        return None
    lines = lines_of_models(view)
    if not lines.all:
        return None
    losses = {
        setting: each
        for fronts in view.fronts
        for setting, each in drawn_losses(fronts.points).items()
    }
    places = {float(i): str(fronts.model) for i, fronts in enumerate(view.fronts)}
    caption = (
        "The settings of each arm that are best with most of the models, joined over the models; "
        "hollow: a model’s best setting where that is another one. See whether the arms come "
        f"closer together or move apart. {_about(view)}"
    )
    return Plot(
        "models",
        "Models and final losses",
        caption,
        partial(choice_plot, lines, losses, labels_of(view), "model", places, view.styles),
    )


def lines_of_models(view: SweepView) -> ChoiceLines:
    """Return what the plot over the models shows."""
    points = [point for fronts in view.fronts for point in fronts.points]
    return model_lines(points, [fronts.model for fronts in view.fronts])


def pretraining_plot(view: SweepView, fronts: ModelFronts, fixed: Fixed) -> Plot | None:
    """Plot final losses over the length of the first phase, if an arm has several."""
    lines = pretraining_lines(fronts.points, fixed)
    if not lines.all:
        return None
    places = sorted({x for x, _ in lines.all})
    if fixed == "total":
        name, title = "pretraining", "first phase, share of the budget"
        heading = "Pre-training length and final losses, the budget fixed"
        ticks = {x: f"{100 * x:.3g}%" for x in places}
        ask = (
            "look for the length beyond which the low-resource loss rises faster than the "
            "high-resource loss falls"
        )
    else:
        name, title = "pretraining_fixed_last", "steps of the first phase"
        heading = "Pre-training length and final losses, the last phase fixed"
        ticks = {x: f"{x:,.0f}" for x in places}
        ask = "the last phase is equally long everywhere: see what more pre-training adds to both"
    caption = (
        "One line per mixture of the last phase, along which only the length of the first phase "
        "changes; hollow and not joined: a length’s best setting where its peaks are others. "
        f"Read it as a choice: {ask}. {_about(view, fronts)}"
    )
    return Plot(
        named(name, fronts),
        heading,
        caption,
        partial(
            choice_plot,
            lines,
            drawn_losses(fronts.points),
            labels_of(view).without_length,
            title,
            ticks,
            view.styles,
        ),
    )


def translation_plot(view: SweepView, fronts: ModelFronts) -> Plot | None:
    """Plot the scores of the best setting of each arm, if sources were translated."""
    scores = _scores(view, view.best_points(fronts))
    if not scores["BLEU"]:
        return None
    return Plot(
        named("translation", fronts),
        "Translations of held-out sources, the best setting of each arm",
        "BLEU and chrF, 0 to 100; higher is better. Best: by losses, as above. "
        + error_sentence(view.best_points(fronts)),
        partial(score_plot, scores, view.styles),
    )


def named(name: str, fronts: ModelFronts) -> str:
    """Return the name of a model's plot."""
    return name if fronts.model is None else f"{name}-{fronts.model}"


def loss_panels(view: SweepView) -> list[Panel]:
    """Return the panels of the fronts of losses."""
    labels, panels = labels_of(view), []
    for fronts in view.fronts:
        losses = drawn_losses(fronts.points)
        marks = [
            Mark(
                point.setting,
                labels(point.setting),
                losses[point.setting].high,
                losses[point.setting].low,
                arm.kind in COMPARED,
                any(point is each for each in arm.front),
            )
            for arm in fronts.arms
            for point in arm.points
        ]
        panels.append(Panel(fronts.model or "", marks, _static_arms(fronts)))
    return panels


def training_panels(view: SweepView) -> list[Panel]:
    """Return the panels of the fronts of losses on training documents."""

    def loss(outcome: Outcome, group: Group) -> float | None:
        known = [outcome.training[task] for task in group if task in outcome.training]
        return fmean(known) if len(known) == len(group) else None

    return _measured_panels(view, loss, higher_is_better=False)


def bleu_panels(view: SweepView) -> list[Panel]:
    """Return the panels of the fronts in BLEU, each the mean over the translated tasks."""

    def bleu(outcome: Outcome, group: Group) -> float | None:
        known = [outcome.translation[task].bleu for task in group if task in outcome.translation]
        return fmean(known) if known else None

    return _measured_panels(view, bleu, higher_is_better=True)


def _measured_panels(
    view: SweepView, value: Callable[[Outcome, Group], float | None], *, higher_is_better: bool
) -> list[Panel]:
    """Return panels of what outcomes measure of both groups, with the fronts of these values."""
    labels, sweep, panels = labels_of(view), view.record.sweep, []
    sign = -1 if higher_is_better else 1
    for fronts in view.fronts:
        points: list[Point] = []
        values: list[tuple[dict[int, float], dict[int, float]]] = []
        for point in fronts.points:
            high, low = (_by_seed(point, value, group) for group in (sweep.high, sweep.low))
            if high is not None and low is not None:
                points.append(point)
                values.append((high, low))
        highs, lows = (without_shared_shift([pair[i] for pair in values]) for i in (0, 1))
        pairs = list(zip(points, highs, lows, strict=True))
        marks = []
        for arm in fronts.arms:
            own = [each for each in pairs if each[0].setting.arm == arm.arm]
            front = nondominated([(sign * high.mean, sign * low.mean) for _, high, low in own])
            marks += [
                Mark(
                    point.setting,
                    labels(point.setting),
                    high,
                    low,
                    arm.kind in COMPARED,
                    i in front,
                )
                for i, (point, high, low) in enumerate(own)
            ]
        panels.append(Panel(fronts.model or "", marks, _static_arms(fronts), higher_is_better))
    return panels


def _by_seed(
    point: Point, value: Callable[[Outcome, Group], float | None], group: Group
) -> dict[int, float] | None:
    """Return the values of all runs of a point; None if one is not known."""
    found = {trial.seed: value(outcome, group) for trial, outcome in point.runs}
    known = {seed: each for seed, each in found.items() if each is not None}
    return known if len(known) == len(found) else None


def _static_arms(fronts: ModelFronts) -> frozenset[str]:
    return frozenset(arm.arm for arm in fronts.arms if arm.kind == "static")


def _about(view: SweepView, fronts: ModelFronts | None = None) -> str:
    """Return what labels and error bars mean."""
    models = view.fronts if fronts is None else [fronts]
    errors = error_sentence([point for each in models for point in each.points])
    return f"{labels_of(view).sentence}{errors}"


def _scores(view: SweepView, best: Sequence[Point]) -> Mapping[str, list[Score]]:
    """Return the scores by measure, with intervals without what seeds do to all arms alike."""
    found: dict[str, list[Score]] = {"BLEU": [], "chrF": []}
    for task in view.tasks:
        points = [
            point for point in best if all(task in outcome.translation for _, outcome in point.runs)
        ]
        for name, scores in found.items():
            measure = name.lower()
            values = [
                {
                    trial.seed: getattr(outcome.translation[task], measure)
                    for trial, outcome in point.runs
                }
                for point in points
            ]
            estimates = without_shared_shift(values)
            scores += [
                Score(task, point.setting.arm, each)
                for point, each in zip(points, estimates, strict=True)
            ]
    return found


def outside_sentence(panels: Sequence[Panel]) -> str:
    """Return a sentence that lists the points outside the limits."""
    sentences = []
    for panel in panels:
        if not panel.marks:
            continue
        front, others = outside(panel)
        where = f"{panel.title}: " if panel.title else ""
        listed = [
            f"{mark.arm} {mark.label} ({mark.x.mean:.2f}, {mark.y.mean:.2f})" for mark in front
        ]
        if others:
            settings = "setting" if others == 1 else "settings"
            listed.append(f"{others} {settings} off the fronts")
        if listed:
            sentences.append(where + ", ".join(listed))
    return f"Outside the picture: {'; '.join(sentences)}." if sentences else ""
