"""What a phase is: a mixture, a length, a learning-rate schedule and reasons to end early."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from megaphase.config.fields import (
    Count,
    Epochs,
    Few,
    FractionOf1,
    LearningRate,
    Nats,
    NatsOrZero,
    PhaseName,
    RoleOrTaskNames,
    Section,
    Steps,
    StepsOrZero,
    Temperature,
)

RATE_SUM_TOLERANCE = 1e-6
PHASE_LENGTHS = ("tokens", "steps", "epochs")


class MixtureConfig(Section):
    """A phase's sampling rates: exactly one of rates, temperature, proportional and unimax.

    over: the tasks among which the last three divide the phase, a list of names or a role.
    """

    rates: dict[str, FractionOf1] | None = None
    temperature: Temperature | None = None
    proportional: Literal[True] | None = None
    unimax: Literal[True] | None = None
    over: RoleOrTaskNames | None = None
    max_epochs: Epochs | None = None

    @field_validator("rates")
    @classmethod
    def _rates_sum_to_one(cls, rates: dict[str, float] | None) -> dict[str, float] | None:
        if rates is not None:
            total = math.fsum(rates.values())
            if abs(total - 1) > RATE_SUM_TOLERANCE:
                raise ValueError(f"the rates sum to {total:.9g}; make them sum to 1")
        return rates

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        methods = ("rates", "temperature", "proportional", "unimax")
        given = [name for name in methods if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of {', '.join(methods)}; found {found}")
        if self.rates is not None and self.over is not None:
            raise ValueError("over goes with temperature, proportional and unimax, not with rates")
        if self.unimax and self.max_epochs is None:
            raise ValueError("unimax needs max_epochs")
        return self


class LearningRateConfig(Section):
    """One phase's schedule, with its own warm-up, or its part of one that spans several phases.

    steps: length of the schedule; the phase's own if left out. first_step: where in it the phase
    begins. decay_steps belongs to `wsd` (warm-up, stable, decay): the length of the final decay.
    """

    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant", "wsd"] = "cosine"
    peak: LearningRate
    final: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: StepsOrZero = 0
    decay_steps: Steps | None = None
    steps: Steps | None = None
    first_step: StepsOrZero = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.final > self.peak:
            raise ValueError(f"final ({self.final:g}) is above peak ({self.peak:g})")
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError("decay_steps is needed by schedule wsd and by no other")
        return self

    @model_validator(mode="after")
    def _begins_within_the_schedule(self) -> Self:
        if self.first_step and self.steps is None:
            raise ValueError("first_step needs steps, the length of the whole schedule")
        if self.steps is not None and self.first_step >= self.steps:
            raise ValueError(
                f"first_step ({self.first_step:,}) is not below steps ({self.steps:,}), the length "
                "of the whole schedule"
            )
        if self.steps is not None and (problem := self.too_long_for(self.steps)):
            raise ValueError(problem)
        return self

    def too_long_for(self, steps: int) -> str | None:
        """What of the schedule does not fit into its length, if anything; with the remedy."""
        decay = self.decay_steps or 0
        if self.warmup_steps + decay <= steps:
            return None
        keys = f"warmup_steps ({self.warmup_steps:,})"
        if self.schedule == "wsd":
            keys += f" and decay_steps ({decay:,})"
        return f"{keys} do not fit the schedule of {steps:,} steps; lower them or make it longer"


class OverfitConfig(Section):
    """Ends a phase when validation losses no longer fall.

    A task has overfit when its validation loss has not fallen by more than `min_gain` below its
    best of this phase for `patience` validations in a row.
    """

    tasks: RoleOrTaskNames
    patience: Few = 3
    min_gain: NatsOrZero = 0.0
    when: Literal["all", "any"] = "all"


class StopConfig(Section):
    """What ends a phase before its length is reached; looked at after every validation.

    loss: validation losses by task, in nats a token; all of them have to be reached.
    """

    overfit: OverfitConfig | None = None
    loss: dict[str, Nats] | None = Field(default=None, min_length=1)


class PhaseConfig(Section):
    """A run of steps with one mixture, one schedule and one optimizer-state policy.

    epochs: the phase's length in passes over the training text of a task; of several tasks, the
    one that gets there first ends it.
    """

    name: PhaseName
    tokens: Count | None = None
    steps: Steps | None = None
    epochs: dict[str, Epochs] | None = Field(default=None, min_length=1)
    mixture: MixtureConfig
    order: Literal["balanced", "random"] = "balanced"
    optimizer_state: Literal["reset", "keep"] = "reset"
    learning_rate: LearningRateConfig
    stop: StopConfig = StopConfig()

    @property
    def length_key(self) -> str:
        """Which of the keys gives the phase's length."""
        return self._length_keys()[0]

    def _length_keys(self) -> list[str]:
        return [key for key in PHASE_LENGTHS if getattr(self, key) is not None]

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = self._length_keys()
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of {', '.join(PHASE_LENGTHS)}; found {found}")
        if self.epochs is not None and self.mixture.max_epochs is not None:
            raise ValueError(
                "epochs does not go with mixture.max_epochs, whose rates depend on the length; "
                "give tokens or steps"
            )
        return self

    @model_validator(mode="after")
    def _ends_within_the_schedule(self) -> Self:
        rate = self.learning_rate
        if self.steps is not None and rate.steps is not None:
            end = rate.first_step + self.steps
            if end > rate.steps:
                raise ValueError(
                    f"the phase ends at step {end:,} of its schedule (learning_rate.first_step "
                    f"{rate.first_step:,} + steps {self.steps:,}), beyond learning_rate.steps "
                    f"({rate.steps:,}); make it {end:,} or more"
                )
        if self.steps is not None and rate.steps is None:
            problem = rate.too_long_for(self.steps)
            if problem:
                raise ValueError(f"learning_rate: {problem}")
        return self
