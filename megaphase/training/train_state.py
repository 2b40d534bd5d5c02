"""The position of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from megaphase.plan.plan import Plan
from megaphase.plan.position import StreamPosition


@dataclass(frozen=True)
class TrainState:
    """A position between two steps of a run.

    Attributes:
        phase: its number; that of the next one at the end of a phase.
        phase_step: steps done in the phase.
        step: steps done over the whole run, and the runs that it continues.
        tokens: likewise, of the global batches of these steps.
        starts: the position of each task's stream before the phase.
    """

    phase: int
    phase_step: int
    step: int
    tokens: int
    starts: tuple[StreamPosition, ...]

    def after_step(self, tokens: int) -> Self:
        """The position one step of the phase later; tokens: of its global batch."""
        return replace(
            self,
            phase_step=self.phase_step + 1,
            step=self.step + 1,
            tokens=self.tokens + tokens,
        )

    def used(self, plan: Plan) -> tuple[StreamPosition, ...]:
        """The position of each task's stream by then."""
        if self.phase_step == 0:
            return self.starts
        counts = plan.counts(self.phase, self.phase_step)
        return tuple(plan.advanced(self.starts, self.phase, counts))

    def steps_left(self, plan: Plan) -> int:
        """Steps until the end of the last phase, if none ends early."""
        return sum(phase.steps for phase in plan.phases[self.phase :]) - self.phase_step

    def next_phase(self, starts: Sequence[StreamPosition]) -> Self:
        """The position at the start of the following phase; `starts` as above."""
        return replace(self, phase=self.phase + 1, phase_step=0, starts=tuple(starts))

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """For a checkpoint's state; a plain number counts samples of the `model` section."""
        known = {each.name: getattr(self, each.name) for each in fields(self)}
        return known | {"starts": [start.to_json(plan.spec.kind) for start in self.starts]}

    @classmethod
    def from_json(cls, state: Mapping[str, Any], plan: Plan) -> Self:
        """From the value of `to_json`; earlier versions stored `tokens_per_step` too."""
        known = {each.name: state[each.name] for each in fields(cls)}
        kind = plan.spec.kind
        starts = tuple(StreamPosition.from_json(start, kind) for start in state["starts"])
        return cls(**{**known, "starts": starts})
