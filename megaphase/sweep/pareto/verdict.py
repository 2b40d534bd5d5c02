"""A plain sentence on each arm against the baselines, and on the primary contrast of a sweep.

The words follow from 95 % intervals (see `contrasts`). An arm wins if it wins against every
baseline: since all of these must be decided, their number needs no adjustment (Berger 1982). It
loses if it loses against every baseline, and is undecided otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.file import PrimaryContrast
from megaphase.sweep.pareto.contrasts import Contrast, Result, baselines, primary_contrasts
from megaphase.sweep.pareto.fronts import ArmFront, ModelFronts
from megaphase.sweep.pareto.statistics import Estimate
from megaphase.sweep.trials import blocked_trials, count_trials

LOSSES = {"mean": "mean", "high": "high-resource", "low": "low-resource"}


@dataclass(frozen=True)
class SweepProgress:
    """The progress of a sweep.

    Attributes:
        ended: number of ended runs, including failed ones.
        planned: number of runs if none fails.
        waiting: whether known runs have not ended.
    """

    ended: int
    planned: int
    waiting: bool

    @property
    def sentence(self) -> str:
        """The sentence at the top of the page."""
        if self.waiting:
            return f"Not finished: {self.ended:,} of {self.planned:,} runs have ended."
        missing = self.planned - self.ended
        never = f" {missing:,} more could not start: the runs before them have failed or diverged."
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
    waiting = any(trial.name not in {*record.outcomes, *blocked} for trial in record.trials)
    return SweepProgress(len(record.outcomes), count_trials(record.sweep), waiting)


def verdicts_of(
    record: SweepRecord, fronts: Sequence[ModelFronts], contrasts: Sequence[Contrast]
) -> list[Verdict]:
    """Return the verdict on the primary contrast, if the sweep file names one, and on every arm
    that is not static, two-phase arms first, model by model.
    """
    progress, primary = progress_of(record), record.sweep.config.primary
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
                others.append(_verdict(model, progress, arm.arm, *compared, front_sentence(arm)))
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
    named = listed([each.against for each in contrasts])
    results = {each.result for each in contrasts}
    result = results.pop() if len(results) == 1 else "undecided"
    # The baseline against which it does worst on the validation split.
    best = max(contrasts, key=lambda each: each.on_validation)
    parts = [_decided(contrasts), _numbers(best, several=len(contrasts) > 1), tasks_of(best)]
    detail = "; ".join(part for part in parts if part)
    return result, _headline(arm.arm, result, named), f"{detail}; {_sizes(best)}"


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


def _decided(contrasts: Sequence[Contrast]) -> str:
    """Return the baselines that are decided where others are not."""
    if len({each.result for each in contrasts}) == 1:
        return ""
    parts = []
    for result in ("wins", "loses"):
        names = [each.against for each in contrasts if each.result == result]
        if names:
            parts.append(f"{result} against {listed(names)}")
    return f"it {', and '.join(parts)}"


def _numbers(contrast: Contrast, *, several: bool) -> str:
    """Return the difference in the mean loss, in nats and in bits per byte."""
    best = ", the best baseline," if several else ""
    mean = contrast.nats.mean
    p = "" if mean.p is None else f" ({probability(mean.p)})"
    text = f"its mean loss differs from that of {contrast.against}{best} by {shown(mean)} nats{p}"
    if contrast.bits is not None:
        text += f", {shown(contrast.bits.mean)} bits per byte"
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
    of = f"best of {contrast.k} random settings" if contrast.k > 1 else "one random setting"
    seeds = "one seed: no interval" if contrast.seeds == 1 else f"{contrast.seeds} seeds"
    return f"{of} of each, {seeds}"


def front_sentence(arm: ArmFront) -> str:
    """Describe an arm's front beside the static one, point by point; this decides nothing."""
    against = arm.against_static
    if against is None:
        return ""
    static, own = len(against.margins), len(against.margins_of_static)
    text = (
        f"Front: it dominates {against.dominated} of the {static} "
        f"{'point' if static == 1 else 'points'} of the static front, static "
        f"{against.dominated_by} of its {own}. "
    )
    found = [each.estimate for each in against.margins if each.estimate is not None]
    missing = len(against.margins) - len(found)
    if found:
        least, most = (choose(found, key=lambda each: each.mean) for choose in (min, max))
        nats = shown(least) if least is most else f"{shown(least)} to {shown(most)}"
        text += (
            "Margin, the low-resource loss that it gains at no higher high-resource loss: "
            f"{nats} nats"
        )
        text += f", none at {missing} of them. " if missing else ". "
    elif missing:
        text += "It reaches no high-resource loss as low as static’s. "
    return text.strip()


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
