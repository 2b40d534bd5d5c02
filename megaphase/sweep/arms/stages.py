"""The stages of a recipe, what they are called, and what makes two of them the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaphase.sweep.arms.config import (
    CONTINUE,
    PRETRAIN,
    ArmPhase,
    LearningRateGrid,
    PhaseSchedule,
)
from megaphase.sweep.arms.lengths import Span
from megaphase.sweep.arms.setting import Mixture
from megaphase.sweep.arms.values import Axes


@dataclass(frozen=True)
class Stage:
    """One phase of a recipe.

    Attributes:
        number: its place in the arm, from 0. name: in run files.
        phase: its keys. peaks: of its schedule, to be tried.
        span, schedule_span: where it, and its whole schedule, begins and ends.
        grid: its schedule, without peaks. scale_with_batch: of its schedule.
        settings: of the run file, in this phase.
        stem: the name of its runs without model, peaks and seed.
        owner: what stands for the arm in the setting of its run, unless it is the last one.
    """

    number: int
    name: str
    phase: ArmPhase
    peaks: Sequence[float]
    span: Span
    schedule_span: Span
    grid: LearningRateGrid
    scale_with_batch: str | None
    settings: Mapping[str, Any]
    stem: str = ""
    owner: str = ""

    @property
    def continues(self) -> bool:
        """Whether it is a further part of the schedule of the stage before."""
        return self.phase.learning_rate == CONTINUE

    @property
    def mixture(self) -> Mixture:
        """What the phase samples, for labels and names."""
        return _mixture(self.phase)

    @property
    def is_short_pretraining(self) -> bool:
        """Whether it is what the first stage of two-phase is, and has the same runs."""
        plain = {"name": PRETRAIN, "share": self.phase.share, "rate": 0.0}
        return (
            self.number == 0
            and self.phase.share is not None
            and _spelled(self.phase) | {"name": self.name} == plain
            and not self.settings
            and self.schedule_span == self.span
        )


@dataclass(frozen=True)
class Recipe:
    """The phases of an arm, with one value for all but peaks and seeds.

    axes: the tried values, apart from peaks. steps: of all phases together.
    """

    arm: str
    stages: Sequence[Stage]
    axes: Axes
    is_short: bool

    @property
    def steps(self) -> int:
        return self.stages[-1].span.end_step


def _mixture(phase: ArmPhase) -> Mixture:
    if isinstance(phase.rate, float | int):
        return Mixture(rate=phase.rate or None)
    if phase.rate is not None:
        return Mixture(text=f"{100 * phase.rate.from_:.3g}→{100 * phase.rate.to:.3g}%")
    assert phase.mixture is not None
    given = phase.mixture.model_dump(mode="json", exclude_none=True)
    temperature = given.pop("temperature", None)
    if isinstance(temperature, float | int) and not given:
        return Mixture(temperature=temperature)
    words = []
    if isinstance(temperature, dict):
        words.append(f"T = {temperature['from']:g}→{temperature['to']:g}")
    elif temperature is not None:
        words.append(f"T = {temperature:g}")
    words += ["UniMax"] if given.pop("unimax", None) else []
    words += ["T = 1"] if given.pop("proportional", None) else []
    for key, value in given.items():
        text = f"{value:g}" if isinstance(value, float | int) else json.dumps(value)
        words.append(f"{key} {text}".replace('"', ""))
    return Mixture(text=", ".join(words))


def _spelled(phase: ArmPhase) -> dict[str, Any]:
    """Return the keys of a phase that are not at their defaults."""
    found = phase.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    if not found.get("learning_rate", True):
        del found["learning_rate"]
    return found


def identity(stage: Stage, usual: LearningRateGrid) -> dict[str, Any]:
    """Return what makes a stage the same in several arms; what is as usual is the same as what is
    left out."""
    found = _spelled(stage.phase) | {"name": stage.name, "settings": dict(stage.settings)}
    for key in ("share", "steps"):
        found.pop(key, None)
    if isinstance(stage.phase.learning_rate, PhaseSchedule):
        defaults = usual.model_dump() | {"scale_with_batch": "none"}
        own = found.pop("learning_rate", {})
        own = {key: value for key, value in own.items() if value != defaults.get(key)}
        found |= {"learning_rate": own} if own else {}
    if found.get("optimizer_state") == ("keep" if stage.continues else "reset"):
        del found["optimizer_state"]
    found["length"] = [str(stage.span.start), str(stage.span.end)]
    if stage.schedule_span != stage.span:
        found["schedule_length"] = [str(stage.schedule_span.start), str(stage.schedule_span.end)]
    return found


def digest(content: Any) -> str:
    """Return a few letters that differ wherever the content does."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
