"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megaphase.config.fields import LearningRate, Section, Steps, StepsOrZero


class LearningRateConfig(Section):
    """Every phase has a learning-rate schedule of its own, or its part of one that spans several
    phases.

    With `steps` and `first_step` phases share one schedule, which then need not restart at a
    switch:

    ```yaml
    phases:
      - name: pretrain
        steps: 900
        learning_rate: {peak: 1e-3, warmup_steps: 50, steps: 1100}
        # …
      - name: joint
        steps: 200
        learning_rate: {peak: 1e-3, warmup_steps: 50, steps: 1100, first_step: 900}
        # …
    ```

    A phase whose length is given in `steps` must end within its schedule. A phase whose length is
    given otherwise and that turns out longer than the schedule continues at `final`. `first_step`
    counts as it is written, even if the phase before has ended early.
    """

    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant", "wsd"] = "cosine"
    """Shape of the decay after the warm-up; `wsd` is warm-up, stable, decay."""
    peak: LearningRate
    """Learning rate at the end of the warm-up."""
    final: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate of the schedule's last step, which is the phase's where `steps` is left out; at
    most `peak`. `inverse_sqrt` never falls below it; `constant` does not use it. A warm-up of all
    steps of the schedule, or of all but one, leaves none for the decay: it is then not reached."""
    warmup_steps: StepsOrZero = 0
    """Optimizer steps of linear warm-up at the schedule's beginning; together with `decay_steps` at
    most the schedule's length."""
    decay_steps: Steps | None = None
    """Optimizer steps of linear decay at the schedule's end; required by `wsd`, not allowed with
    the others."""
    steps: Steps | None = None
    """Length of the schedule in optimizer steps; the phase's own length if left out."""
    first_step: StepsOrZero = 0
    """Step of the schedule at which the phase begins; below `steps`, which it needs."""
    scale_with_batch: Literal["none", "sqrt"] = "none"
    """`sqrt`: a step whose batch is smaller than the full batch of its phase, in a ramp, has the
    schedule's rate times √(batch / full batch). `none`: the batch changes nothing."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.final > self.peak:
            raise ValueError(f"final ({self.final:g}) is above peak ({self.peak:g}); lower it")
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
        """Return which part of the schedule does not fit into its length, with the remedy, or
        None."""
        decay = self.decay_steps or 0
        if self.warmup_steps + decay <= steps:
            return None
        keys = f"warmup_steps ({self.warmup_steps:,})"
        if self.schedule == "wsd":
            keys += f" and decay_steps ({decay:,})"
        return f"{keys} do not fit the schedule of {steps:,} steps; lower them or make it longer"


def learning_rate(config: LearningRateConfig, step: int, steps: int) -> float:
    """Return the rate of optimizer step `step` (0-based) of a phase of `steps` steps.

    If the schedule has its own length, the phase is its part that begins at `first_step`. Warm-up
    rises linearly and reaches `peak` at the schedule's step `warmup_steps`; all but `constant` and
    `inverse_sqrt` reach `final` at the schedule's last step, where that is a later one, and a
    longer phase stays there.

    cosine: Loshchilov and Hutter 2017. inverse_sqrt: Vaswani et al. 2017, from the peak, not below
    `final`. wsd: Hu et al. 2024, stable at the peak, then linear over the last `decay_steps`.
    """
    step += config.first_step
    steps = steps if config.steps is None else config.steps
    if step < config.warmup_steps:
        return config.peak * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.peak
    if config.schedule == "inverse_sqrt":
        origin = max(config.warmup_steps, 1)
        return max(config.final, config.peak * math.sqrt(origin / max(step, origin)))
    start = config.warmup_steps
    if config.schedule == "wsd":
        assert config.decay_steps is not None
        # The first of the last `decay_steps` still has the peak, but if it is the only one.
        start = max(start, steps - max(config.decay_steps, 2))
    progress = _progress(step, start, steps - 1)
    falling = 1 - progress
    if config.schedule == "cosine":
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    return config.final + (config.peak - config.final) * falling


def batch_scale(config: LearningRateConfig, samples: int, full: int) -> float:
    """Return the factor of the rate of a step of `samples` samples, of a phase whose full batch has
    `full` samples; with a batch of B of them Adam's noise grows as 1/√B (Malladi et al. 2022)."""
    return math.sqrt(samples / full) if config.scale_with_batch == "sqrt" else 1.0


def _progress(step: int, start: int, last: int) -> float:
    """0 up to `start`, 1 at `last`, linear between."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / max(1, last - start))
