"""The position of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from megaphase.plan.plan import Plan


@dataclass(frozen=True)
class TrainState:
    """A position between two steps of a run.

    Attributes:
        phase: its number; that of the next one at the end of a phase.
        phase_step: steps done in the phase.
        step: steps done over the whole run, and the runs that it continues.
        tokens: likewise, of the global batches of these steps.
        starts: samples of each task that were used before the phase.
    """

    phase: int
    phase_step: int
    step: int
    tokens: int
    starts: tuple[int, ...]

    def after_step(self, tokens: int) -> Self:
        """The position one step of the phase later; tokens: of its global batch."""
        return replace(
            self,
            phase_step=self.phase_step + 1,
            step=self.step + 1,
            tokens=self.tokens + tokens,
        )

    def used(self, plan: Plan) -> tuple[int, ...]:
        """Samples of each task that were used by then."""
        if self.phase_step == 0:
            return self.starts
        counts = plan.counts(self.phase, self.phase_step).tolist()
        return tuple(a + b for a, b in zip(self.starts, counts, strict=True))

    def steps_left(self, plan: Plan) -> int:
        """Steps until the end of the last phase, if none ends early."""
        return sum(phase.steps for phase in plan.phases[self.phase :]) - self.phase_step

    def next_phase(self, starts: Sequence[int]) -> Self:
        """The position at the start of the following phase; `starts` as above."""
        return replace(self, phase=self.phase + 1, phase_step=0, starts=tuple(starts))

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """From the value of `dataclasses.asdict`; earlier versions stored `tokens_per_step` too."""
        known = {each.name: state[each.name] for each in fields(cls)}
        return cls(**{**known, "starts": tuple(state["starts"])})
