"""Where the phases of an arm begin and end, exactly as written and in optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megaphase.sweep.arms.config import Arm, ArmPhase
from megaphase.sweep.sweep import Sweep
from megaphase.utils.decimals import as_written
from megaphase.utils.errors import InputError


@dataclass(frozen=True)
class Place:
    """A place in a recipe: a share of the sweep's budget, and steps beyond it."""

    share: Fraction = Fraction(0)
    steps: int = 0

    def after(self, phase: ArmPhase) -> Place:
        """Return the place at the end of a phase that begins here and gives its length."""
        share = Fraction(0) if phase.share is None else as_written(phase.share)
        return Place(self.share + share, self.steps + (phase.steps or 0))

    def step(self, budget: int) -> int:
        """Return the optimizer steps before this place."""
        return round(self.share * budget) + self.steps

    def __str__(self) -> str:
        return f"{self.share}+{self.steps}"


BUDGET = Place(Fraction(1))


@dataclass(frozen=True)
class Span:
    """From one place to another, with the optimizer steps before both."""

    start: Place
    end: Place
    start_step: int
    end_step: int

    @property
    def steps(self) -> int:
        return self.end_step - self.start_step

    def joined(self, last: Span) -> Span:
        """Return the span from the start of this one to the end of another."""
        return Span(self.start, last.end, self.start_step, last.end_step)


def spans(
    sweep: Sweep, where: str, arm: Arm, phases: Sequence[ArmPhase], *, is_short: bool
) -> list[Span]:
    """Return the spans of the phases of an arm.

    is_short: a phase that would have no step gets one.

    Raises:
        InputError: a phase would have no step, or they do not sum to the budget.
    """
    found: list[Span] = []
    place, step = Place(), 0
    for number, phase in enumerate(phases):
        key = f"{where}.phases[{number}]"
        has_length = phase.share is not None or phase.steps is not None
        is_last = number == len(phases) - 1
        if not has_length and not is_last:
            raise InputError(
                key, "only the last phase may leave out its length", "add share or steps"
            )
        end = place.after(phase) if has_length else BUDGET
        end_step = end.step(sweep.steps)
        if is_short and not is_last:
            end_step = min(max(1, end_step), sweep.steps - 1)
        if end_step <= step:
            what = "share or steps" if has_length else "the phases before it"
            problem = f"would have {end_step - step:,} of the budget’s {sweep.steps:,} steps"
            remedy = f"{'raise' if has_length else 'shorten'} {what}"
            raise InputError(key, problem, remedy)
        found.append(Span(place, end, step, end_step))
        place, step = end, end_step
    if step != sweep.steps and arm.budget == "sweep":
        raise InputError(
            f"{where}.phases",
            f"have {step:,} steps together, and the budget is {sweep.steps:,}",
            "leave out the length of the last one, or write budget: own",
        )
    return found
