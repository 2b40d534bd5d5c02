"""A plain sentence that compares each arm with the static front; may be negative or undecided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.pareto.fronts import ArmFront, Comparison, Margin, ModelFronts
from megaphase.sweep.trials import count_trials

Outcome = Literal["wins", "loses", "undecided"]


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
    """The comparison of an arm with the static front, with one model."""

    arm: str
    model: str | None
    outcome: Outcome
    headline: str
    detail: str

    @property
    def sentence(self) -> str:
        """The whole sentence."""
        return f"{self.headline}: {self.detail}."


def progress_of(record: SweepRecord) -> SweepProgress:
    """Return the number of ended runs and the total."""
    waiting = any(trial.name not in record.outcomes for trial in record.trials)
    return SweepProgress(len(record.outcomes), count_trials(record.sweep), waiting)


def verdicts_of(record: SweepRecord, fronts: Sequence[ModelFronts]) -> list[Verdict]:
    """Return the verdict on every arm that is not static, two-phase arms first, model by model."""
    progress = progress_of(record)
    return [
        _verdict(arm, model, progress)
        for model in fronts
        for arm in sorted(model.arms, key=lambda arm: arm.kind != "two-phase")
        if arm.kind != "static"
    ]


def _verdict(arm: ArmFront, model: ModelFronts, progress: SweepProgress) -> Verdict:
    outcome, headline, detail = _compare(arm, model)
    if progress.waiting:
        headline = f"So far, with {progress.ended:,} of {progress.planned:,} runs, {headline}"
    if model.model is not None:
        headline = f"{model.model}: {headline}"
    return Verdict(arm.arm, model.model, outcome, headline, detail)


def _compare(arm: ArmFront, model: ModelFronts) -> tuple[Outcome, str, str]:
    """Return outcome, headline and detail."""
    against = arm.against_static
    if against is None:
        return "undecided", *_nothing_to_compare(arm, model)
    if against.dominated == len(against.margins):
        parts = f"it dominates {_all_of(against.margins)} of the static front"
        return (
            "wins",
            f"{arm.arm} wins against static",
            f"{parts}; {_how_much(against.margins)}",
        )
    if against.dominated_by == len(against.margins_of_static):
        parts = f"static dominates {_all_of(against.margins_of_static)} of its front"
        return (
            "loses",
            f"{arm.arm} loses against static",
            f"{parts}; {_how_much(against.margins_of_static, 'static’s')}",
        )
    return "undecided", f"{arm.arm} against static is undecided", _mixed(against)


def _nothing_to_compare(arm: ArmFront, model: ModelFronts) -> tuple[str, str]:
    if not any(each.kind == "static" for each in model.arms):
        return f"there is no verdict on {arm.arm}", "the sweep has no static arm"
    who = "static" if arm.front else arm.arm
    return f"there is no verdict on {arm.arm} yet", f"no run of {who} has ended normally"


def _all_of(margins: Sequence[Margin]) -> str:
    return "the only point" if len(margins) == 1 else f"each of the {len(margins)} points"


def _mixed(against: Comparison) -> str:
    static, own = len(against.margins), len(against.margins_of_static)
    text = (
        f"of the static front’s points it dominates {against.dominated} of {static}, "
        f"static {against.dominated_by} of its {own}"
    )
    nats = [margin.nats for margin in against.margins]
    if any(each is not None and each > 0 for each in nats):
        text += f"; {_how_much(against.margins)}"
    if against.dominated < len(nats) and (worse := _worse(nats)):
        text += f"; {worse}"
    return text


def _worse(nats: Sequence[float | None]) -> str:
    """Return in which points of the static front the arm is worse."""
    higher = [each for each in nats if each is not None and each < 0]
    missing = sum(each is None for each in nats)
    parts = []
    if higher:
        where = "one point" if len(higher) == 1 else f"{len(higher)} points"
        parts.append(f"at {where} it is higher, by up to {-min(higher):.3f} nats")
    if missing:
        where = "one point" if missing == 1 else f"{missing} points"
        parts.append(f"at {where} it reaches no high-resource loss as low as static’s")
    return ", and ".join(parts)


def _how_much(margins: Sequence[Margin], whose: str = "its") -> str:
    """Return the margin in nats, at which high loss, and whether it exceeds the noise."""
    gains = [m for m in margins if m.nats is not None and m.nats >= 0]
    least = min(gains, key=lambda margin: margin.nats or 0.0)
    most = max(gains, key=lambda margin: margin.nats or 0.0)
    text = f"at no higher high-resource loss {whose} low-resource loss is lower by {_gain(least)}"
    if most is not least:
        text += f" to {_gain(most)}"
    return f"{text}; {_noise(gains)}"


def _gain(margin: Margin) -> str:
    return f"{margin.nats:.3f} nats (high-resource {margin.point.high.mean:.3f})"


def _noise(gains: Sequence[Margin]) -> str:
    measured = [margin for margin in gains if margin.error is not None]
    if not measured:
        return "one seed: no error bars"
    beyond = sum(margin.is_beyond_noise for margin in measured)
    if len(gains) == 1:
        return f"that {'exceeds' if beyond else 'does not exceed'} two standard errors"
    if beyond in (0, len(gains)):
        return f"that exceeds two standard errors {'everywhere' if beyond else 'nowhere'}"
    return f"that exceeds two standard errors at {beyond} of these {len(gains)} points"
