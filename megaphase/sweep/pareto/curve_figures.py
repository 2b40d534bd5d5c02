"""The plots of a sweep's page with curves, with captions that explain what to look for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from megaphase.report.page import Plot
from megaphase.sweep.pareto.choice_lines import steps_of
from megaphase.sweep.pareto.curve_plots import (
    TokenLine,
    convergence_plot,
    overfitting_plot,
    task_curves_plot,
    token_line,
    token_plot,
)
from megaphase.sweep.pareto.figures import (
    COMPARED,
    labels_of,
    named,
    pretraining_plot,
    translation_plot,
)
from megaphase.sweep.pareto.fronts import ArmFront, ModelFronts
from megaphase.sweep.pareto.overfit import single_stage_points
from megaphase.sweep.pareto.points import Point, best_by_mixture, best_of
from megaphase.sweep.pareto.view import SweepView

STEEP = "The steep beginning may be cut off at the top, as is then noted."
MOST_LINES = 12  # of a figure, so that they can be told apart
LAST_PART = 0.1  # of the pre-training, over which its convergence is measured


def overfitting_figure(view: SweepView, fronts: ModelFronts) -> Plot | None:
    """Plot training against validation loss of the single-phase arms."""
    points = single_stage_points(fronts)
    if not points:
        return None
    shown, rest = fewer(points)
    labels = labels_of(view)
    several = len({point.setting.arm for point in points}) > 1
    titles = [
        f"{point.setting.arm} {labels(point.setting)}" if several else labels(point.setting)
        for point in shown
    ]
    more = f" The other {len(rest)} settings are in the table." if rest else ""
    return Plot(
        named("overfitting", fronts),
        "Low-resource training and validation loss",
        "Where the two separate, the model memorizes its few texts: see how far the solid "
        "line rises from its lowest point (circle) while the dashed one keeps falling. One panel "
        f"per mixture and peak. {labels.sentence}{STEEP}{more}",
        partial(
            overfitting_plot, shown, view.curves, view.record.sweep.low, titles, view.styles
        ),
    )  # fmt: skip


def curve_figures(view: SweepView, fronts: ModelFronts) -> Iterator[Plot]:
    """Yield a model's plots of curves, data efficiency, pre-training length and scores, if any."""
    best = view.best_points(fronts)
    if not best:
        return
    yield _task_curves(view, fronts, best)
    lines = efficiency_lines(view, fronts)
    if lines:
        yield from _token_plots(view, fronts, lines)
    for fixed in ("total", "last phase"):
        if (plot := pretraining_plot(view, fronts, fixed)) is not None:
            yield plot
    if staged := convergence_lines(view, fronts):
        yield _convergence(view, fronts, staged)
    if (plot := translation_plot(view, fronts)) is not None:
        yield plot


def fewer(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Return as many points as a figure can show, in their order, and the others.

    Of every arm at least the best one is shown, as long as there is room; then those with the
    lowest mean losses on the validation split.
    """
    if len(points) <= MOST_LINES:
        return list(points), []
    by_arm: dict[str, list[Point]] = {}
    for point in points:
        by_arm.setdefault(point.setting.arm, []).append(point)
    first = {id(best_of(each)) for each in by_arm.values()}
    order = sorted(points, key=lambda point: (id(point) not in first, point.chosen_by.mean))
    kept = {id(point) for point in order[:MOST_LINES]}
    shown = [point for point in points if id(point) in kept]
    return shown, [point for point in points if id(point) not in kept]


def _task_curves(view: SweepView, fronts: ModelFronts, best: Sequence[Point]) -> Plot:
    shown, rest = fewer(best)
    labels = labels_of(view)
    names = [f"{point.setting.arm} {labels(point.setting)}" for point in shown]
    return Plot(
        named("losses", fronts),
        "Validation loss per task, the best setting of each arm",
        "Best: the lowest mean of high- and low-resource loss. Dots, and dashed lines if there are "
        "few: where another phase begins; compare its gain on the low-resource tasks with its "
        f"cost on the others. {labels.sentence}{STEEP} So are losses of a task before its text is "
        f"trained on.{_left_out(rest)}",
        partial(task_curves_plot, shown, view.curves, view.tasks, names, view.styles),
    )


def _token_plots(
    view: SweepView, fronts: ModelFronts, lines: Sequence[TokenLine]
) -> Iterator[Plot]:
    labels = labels_of(view)
    rest = _efficiency_points(fronts)[1]
    about = f"{labels.sentence}{STEEP}{_left_out(rest)}"
    yield Plot(
        named("data_efficiency", fronts),
        "Data efficiency",
        "Low-resource validation loss, nats per token, against the low-resource tokens seen so "
        "far, one line per mixture of the static and two-phase arms, two-phase with the length of "
        "its best setting: at the same number of tokens, the lower line has learned more "
        f"from them; a line that turns up has seen them too often. {about}",
        partial(token_plot, lines, "validation", labels, view.styles),
    )
    if any(np.isfinite(line.training).any() for line in lines):
        yield Plot(
            named("training_efficiency", fronts),
            "Training loss over the tokens seen",
            "The same lines with the loss on the training text itself, each value the mean since "
            "the previous validation. Where a rate needs fewer tokens for the same training loss "
            "and yet has the higher validation loss above, it has memorized rather than learned. "
            f"{about}",
            partial(token_plot, lines, "training", labels, view.styles),
        )


def _convergence(view: SweepView, fronts: ModelFronts, lines: Sequence[TokenLine]) -> Plot:
    labels = labels_of(view)
    return Plot(
        named("convergence", fronts),
        "Convergence before the last phase",
        "High-resource loss over the passes through the high-resource text; dot: the last phase "
        "begins. One line per arm and length of the phases before it, with its best "
        f"setting. {convergence_sentence(view, lines)} {labels.sentence}{STEEP}",
        partial(convergence_plot, lines, view.curves, labels, view.styles),
    )


def efficiency_lines(view: SweepView, fronts: ModelFronts) -> list[TokenLine]:
    """Return the lines of the plots over low-resource tokens."""
    sweep = view.record.sweep
    return [
        token_line(point, view.curves, sweep.low, sweep.tokens)
        for point in _efficiency_points(fronts)[0]
    ]


def _efficiency_points(fronts: ModelFronts) -> tuple[list[Point], list[Point]]:
    """Return the points of the compared arms, if there are any, that are shown, and the others."""
    arms = [arm for arm in fronts.arms if arm.kind in COMPARED] or list(fronts.arms)
    return fewer([point for arm in arms for point in _of_best_share(arm)])


def _of_best_share(arm: ArmFront) -> list[Point]:
    """Return, for every mixture, the best peak with the pre-training length of the best point."""
    points = best_by_mixture(arm.points)
    share = min(points, key=lambda point: point.chosen_by.mean).setting.share if points else None
    return [point for point in points if point.setting.share == share]


def convergence_lines(view: SweepView, fronts: ModelFronts) -> list[TokenLine]:
    """Return a line for every arm and length of pre-training, with its best setting."""
    sweep = view.record.sweep
    groups: dict[object, list[Point]] = {}
    for point in fronts.points:
        if len(steps := steps_of(point)) > 1:
            groups.setdefault((point.setting.arm, steps[:-1]), []).append(point)
    found = (best_of(each) for each in groups.values())
    shown, _ = fewer([point for point in found if point is not None])
    return [token_line(point, view.curves, sweep.high, sweep.tokens) for point in shown]


def convergence_sentence(view: SweepView, lines: Sequence[TokenLine]) -> str:
    """Return how far the longest pre-training had converged."""
    line = max(lines, key=lambda line: epochs_before_last_phase(view, line))
    epochs, fall = epochs_before_last_phase(view, line), fall_at_the_end(view, line)
    moved = f"{'fell' if fall >= 0 else 'rose'} by {abs(fall):.3f} nats"
    return (
        f"The longest pre-training ({line.point.setting.arm}) ends after {epochs:.2f} epochs; over "
        f"its last {LAST_PART:.0%} the high-resource loss {moved}."
    )


def epochs_before_last_phase(view: SweepView, line: TokenLine) -> float:
    """Return the epochs of the group's text at the beginning of the last phase."""
    return float(np.interp(_end_of_pretraining(view, line), line.steps, line.epochs))


def fall_at_the_end(view: SweepView, line: TokenLine) -> float:
    """Return how much the loss fell over the last part of the pre-training, in nats per token."""
    end = _end_of_pretraining(view, line)
    before, after = np.interp(((1 - LAST_PART) * end, end), line.steps, line.validation)
    return float(before - after)


def _end_of_pretraining(view: SweepView, line: TokenLine) -> int:
    switches = view.curves[line.point.runs[0][0].name].switches
    return switches[-1] if switches else 0


def _left_out(rest: Sequence[Point]) -> str:
    if not rest:
        return ""
    arms = list(dict.fromkeys(point.setting.arm for point in rest))
    names = ", ".join(arms[:8]) + (", …" if len(arms) > 8 else "")
    return f" Not shown, for want of room: {len(rest)} settings with higher losses ({names})."
