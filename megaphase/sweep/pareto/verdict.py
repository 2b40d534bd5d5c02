"""A plain sentence on each arm against the baselines, and on the primary contrast of a sweep.

The words follow from 95 % intervals (see `contrasts`). An arm wins if it wins against every
baseline: since all of these must be decided, their number needs no adjustment (Berger 1982). It
loses if it loses against every baseline, and is undecided otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.file import PrimaryContrast
from megaphase.sweep.pareto.contrasts import Contrast, Result, baselines, primary_contrasts
from megaphase.sweep.pareto.fronts import ArmFront, Margin, ModelFronts
from megaphase.sweep.pareto.labels import peaks_label
from megaphase.sweep.pareto.statistics import Estimate
from megaphase.sweep.trials import blocked_trials, count_trials

MOST_MARGINS = 4  # that a sentence lists
LOSSES = {"mean": "mean", "high": "high-resource", "low": "low-resource"}


@dataclass(frozen=True)
class SweepProgress:
    """The progress of a sweep.

    Attributes:
        ended: number of ended runs, including failed ones.
        planned: number of runs if none fails.
        waiting: whether known runs have not ended.
        prunes: whether worse settings are stopped.
    """

    ended: int
    planned: int
    waiting: bool
    prunes: bool = False

    @property
    def sentence(self) -> str:
        """The sentence at the top of the page."""
        if self.waiting:
            return f"Not finished: {self.ended:,} of {self.planned:,} runs have ended."
        missing = self.planned - self.ended
        reasons = "failed, diverged or been pruned" if self.prunes else "failed or diverged"
        never = f" {missing:,} more could not start: the runs before them have {reasons}."
        return f"Finished: {self.ended:,} runs.{never if missing > 0 else ''}"


@dataclass(frozen=True)
class Verdict:
    """The comparison of an arm with the baselines, with one model.

    front: a description of its front beside the static one; empty if there is nothing to describe.
    is_primary: whether it is about the primary contrast of the sweep file.
    """

    arm: str
    model: str | None
    outcome: Result
    headline: str
    detail: str
    front: str = ""
    is_primary: bool = False

    @property
    def sentence(self) -> str:
        """The whole sentence."""
        return f"{self.headline}: {self.detail}."


def progress_of(record: SweepRecord) -> SweepProgress:
    """Return the number of ended runs and the total."""
    blocked = {trial.name for trial in blocked_trials(record.trials, record.outcomes)}
    settled = blocked | record.outcomes.keys()
    waiting = any(trial.name not in settled for trial in record.trials)
    prunes = record.sweep.config.halving is not None
    return SweepProgress(len(record.outcomes), count_trials(record.sweep), waiting, prunes)


def verdicts_of(
    record: SweepRecord,
    fronts: Sequence[ModelFronts],
    contrasts: Sequence[Contrast],
    progress: SweepProgress,
) -> list[Verdict]:
    """Return the verdict on the primary contrast, if the sweep file names one, and on every arm
    that is not static, two-phase arms first, model by model.
    """
    primary = record.sweep.config.primary
    first, others = [], []
    for model in fronts:
        if primary is not None and primary.model in (None, model.model):
            named = [c for c in primary_contrasts(record, fronts) if c.model == model.model]
            verdict = _verdict(model, progress, primary.arm, *_primary(primary, named))
            first.append(replace(verdict, is_primary=True))
        for arm in sorted(model.arms, key=lambda arm: arm.kind != "two-phase"):
            if arm.kind != "static":
                own = [c for c in contrasts if (c.model, c.arm) == (model.model, arm.arm)]
                compared = _compare(arm, model, own)
                front = front_sentence(arm, model, compared[0])
                others.append(_verdict(model, progress, arm.arm, *compared, front))
    return first + others


def _verdict(
    model: ModelFronts,
    progress: SweepProgress,
    arm: str,
    result: Result,
    headline: str,
    detail: str,
    front: str = "",
) -> Verdict:
    if progress.waiting:
        headline = f"So far, with {progress.ended:,} of {progress.planned:,} runs, {headline}"
    if model.model is not None:
        headline = f"{model.model}: {headline}"
    return Verdict(arm, model.model, result, headline, detail, front)


def _primary(primary: PrimaryContrast, contrasts: Sequence[Contrast]) -> tuple[Result, str, str]:
    """Return outcome, headline and detail of the primary contrast."""
    named = listed(primary.against)
    loss = f"{LOSSES.get(primary.loss, primary.loss)} loss"
    if len(contrasts) < len(primary.against):
        headline = f"primary contrast: there is no verdict on {primary.arm} against {named} yet"
        return "undecided", headline, "no seed of both has ended normally"
    signs = {contrast.nats.of(primary.loss).sign for contrast in contrasts}
    result: Result = "undecided"
    if signs in ({-1}, {1}):
        result = "wins" if signs == {-1} else "loses"
    parts = [
        f"by {shown(each.nats.of(primary.loss))} nats from that of {each.against} ({_chosen(each)})"
        for each in contrasts
    ]
    headline = f"primary contrast, in the {loss}: {_headline(primary.arm, result, named)}"
    return result, headline, f"it differs {' and '.join(parts)}"


def _compare(
    arm: ArmFront, model: ModelFronts, contrasts: Sequence[Contrast]
) -> tuple[Result, str, str]:
    """Return outcome, headline and detail."""
    if not contrasts:
        return "undecided", *_nothing_to_compare(arm, model)
    results = {each.result for each in contrasts}
    result = results.pop() if len(results) == 1 else "undecided"
    # The baseline against which it does worst on the validation split.
    best = max(contrasts, key=lambda each: each.on_validation.mean)
    parts = [_numbers(best, several=len(contrasts) > 1), tasks_of(best), _sizes(best)]
    return result, _headlines(arm.arm, contrasts), "; ".join(part for part in parts if part)


def _headlines(arm: str, contrasts: Sequence[Contrast]) -> str:
    """Return against which baselines an arm wins and loses, and where it is undecided."""
    against = {
        result: listed([each.against for each in contrasts if each.result == result])
        for result in get_args(Result)
        if any(each.result == result for each in contrasts)
    }
    if len(against) == 1:
        ((result, named),) = against.items()
        return _headline(arm, result, named)
    verbs = {"undecided": "is undecided"}
    return f"{arm} " + listed(
        [f"{verbs.get(r, r)} against {named}" for r, named in against.items()]
    )


def _headline(arm: str, result: Result, against: str) -> str:
    if result == "undecided":
        return f"{arm} against {against} is undecided"
    return f"{arm} {result} against {against}"


def _nothing_to_compare(arm: ArmFront, model: ModelFronts) -> tuple[str, str]:
    others = [each for each in baselines(model) if each is not arm]
    if not others:
        return f"there is no verdict on {arm.arm}", "the sweep has no baseline for it"
    headline = f"there is no verdict on {arm.arm} yet"
    if not arm.points or not any(each.points for each in others):
        who = listed([each.arm for each in others], "or") if arm.points else arm.arm
        return headline, f"no run of {who} has ended normally"
    return headline, "no seed of both sides has ended"


def _numbers(contrast: Contrast, *, several: bool) -> str:
    """Return the difference in the mean loss, in nats and in bits per byte."""
    best = ", the best baseline," if several else ""
    mean = contrast.nats.mean
    p = "" if mean.p is None else f" ({probability(mean.p)})"
    text = f"its mean loss differs from that of {contrast.against}{best} by {shown(mean)} nats{p}"
    if contrast.bits is not None:
        text += f", {shown(contrast.bits.mean)} bits per byte"
        if contrast.bits.mean.sign == 0 != mean.sign:
            text += ", which is undecided"
    if contrast.is_reversed and mean.sign != 0:
        text += f", but on the validation split by {shown(contrast.on_validation)} nats"
    return text


def tasks_of(contrast: Contrast) -> str:
    """Return for which tasks the arm is better or worse, and which of them pay."""
    tasks = contrast.nats.tasks.items()
    if contrast.seeds == 1:
        return "by task " + ", ".join(f"{task} {each.mean:+.3f}" for task, each in tasks)
    named = {
        sign: [f"{task} ({each.mean:+.3f})" for task, each in tasks if each.sign == sign]
        for sign in (-1, 1)
    }
    lower, higher = named[-1], named[1]
    parts = [f"lower for {listed(lower)}"] if lower else []
    if lower and higher:
        parts.append(f"for which {listed(higher)} {'pays' if len(higher) == 1 else 'pay'}")
    elif higher:
        parts.append(f"higher for {listed(higher)}")
    if undecided := [task for task, each in tasks if each.sign == 0]:
        parts.append(f"undecided for {listed(undecided)}")
    return ", ".join(parts)


def _sizes(contrast: Contrast) -> str:
    """Return the numbers of settings and seeds, and the difference with all settings."""
    own, other = contrast.settings
    if own == other:
        return _chosen(contrast)
    best = contrast.best_of_all
    text = f"{_chosen(contrast)}; best of all {own} and {other} settings: {shown(best)} nats"
    open_only_with_all = best.sign == 0 and contrast.nats.mean.sign != 0
    return f"{text}, which is undecided" if open_only_with_all else text


def _chosen(contrast: Contrast) -> str:
    drawn = "" if contrast.settings == (contrast.k, contrast.k) else "random "
    of = f"best of {contrast.k} {drawn}settings" if contrast.k > 1 else f"one {drawn}setting"
    seeds = "one seed: no interval" if contrast.seeds == 1 else f"{contrast.seeds} seeds"
    return f"{of} of each, {seeds}"


def front_sentence(arm: ArmFront, model: ModelFronts, result: Result) -> str:
    """Describe an arm's front beside the static one, point by point; this decides nothing."""
    against, volume, static_volume = arm.against_static, arm.hypervolume, model.static_hypervolume
    if against is None or volume is None or static_volume is None:
        return ""
    static, own = len(against.margins), len(against.margins_of_static)
    outside = own - against.dominated_by
    text = (
        f"{_size_of_front(volume, static_volume, result)}: {_own_outside(outside, own)} the area "
        f"that static dominates, and it {_dominates(against.dominated, static)}. "
    )
    if all(each.estimate is None for each in against.margins):
        return f"{text}It reaches no high-resource loss as low as static’s."
    return f"{text}{_margins_sentence(against.margins)}"


def _own_outside(outside: int, own: int) -> str:
    if own == 1:
        return f"its only point lies {'outside' if outside else 'within'}"
    return f"{outside} of its {own} points {'lies' if outside == 1 else 'lie'} outside"


def _dominates(dominated: int, static: int) -> str:
    if static == 1:
        return f"{'dominates' if dominated else 'does not dominate'} the only static point"
    return f"dominates {dominated} of the {static} static points"


def _size_of_front(volume: float, static_volume: float, result: Result) -> str:
    """Compare hypervolumes, and say so if they and the verdict, which is about one place of the
    front, disagree."""
    if volume == static_volume == 0:
        return (
            "The whole front has no hypervolume to compare, nor has the static one, as no point of "
            "either is better in both losses than the worst of the few static settings"
        )
    larger = volume > static_volume
    unlike = ", unlike that one comparison," if larger == (result != "wins") else ""
    return (
        f"The whole front{unlike} has {'a larger' if larger else 'no larger'} hypervolume than the "
        f"static one ({volume:.4f}, static {static_volume:.4f})"
    )


def _margins_sentence(margins: Sequence[Margin]) -> str:
    """Return the margin at every static point or, of many, at three of them."""
    found = [each for each in margins if each.estimate is not None]
    named = found
    if len(margins) > MOST_MARGINS:
        ordered = sorted(found, key=lambda each: each.nats or 0.0)
        last = len(found) - 1
        named = [ordered[i] for i in sorted({0, last // 2, last})]
    settings = [each.point.setting for each in margins]
    with_peaks = len({setting.short_label for setting in settings}) < len(settings)
    parts = [
        f"{shown(each.estimate)} nats at static {_named(each.point.setting, with_peaks)}"
        for each in named
        if each.estimate is not None
    ]
    which = "" if len(named) == len(found) else f" (least, median and most of {len(found)})"
    missing = len(margins) - len(found)
    at = "point, whose high-resource loss" if missing == 1 else "points, whose high-resource losses"
    none = f"; none at {missing} static {at} it does not reach" if missing else ""
    return (
        f"Margin{which}, the low-resource loss that it gains at no higher high-resource loss: "
        f"{listed(parts)}{none}."
    )


def _named(setting: TriedSetting, with_peaks: bool) -> str:
    return f"{setting.short_label}{f', {peaks_label(setting.peaks)}' if with_peaks else ''}"


def shown(estimate: Estimate) -> str:
    """Return a signed mean with its interval."""
    if estimate.low is None:
        return f"{estimate.mean:+.3f}"
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def probability(p: float) -> str:
    """Return `p = …`, or that it is tiny."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """Return `a, b and c`."""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
