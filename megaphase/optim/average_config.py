"""The `average` section of a phase in a run file."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from megaphase.config.fields import ProperFraction, Section, Steps


class AverageConfig(Section):
    """An average of the weights after some of the phase's steps, beside the weights, which it does
    not change. It is fp32, sharded as the fp32 weights are, saved in checkpoints, and its held-out
    losses are measured beside those of the weights; see [averages.md](averages.md)."""

    kind: Literal["ema", "uniform"]
    """`ema`: an exponential moving average, which each time is `decay` times itself plus 1 -
    `decay` times the weights. `uniform`: the mean, in which all weights that were taken count
    equally."""
    decay: ProperFraction | None = None
    """For `ema`, which needs it: how much of the average is kept each time, for example 0.999."""
    every_steps: Steps = 1
    """Optimizer steps of the phase from one time that the weights are taken to the next."""
    from_step: Steps = 1
    """The step of the phase after which the weights are taken first; the average begins with
    them."""
    device: Literal["weights", "cpu"] = "weights"
    """Memory for the average: that of the fp32 weights, or the node's memory, `cpu`. It may be
    changed when the run is resumed."""

    def is_due(self, phase_step: int) -> bool:
        """Return whether the weights after a step of the phase, counted from 1, are taken."""
        return (
            phase_step >= self.from_step and (phase_step - self.from_step) % self.every_steps == 0
        )

    @model_validator(mode="after")
    def _decay_of_ema(self) -> Self:
        if self.kind == "ema" and self.decay is None:
            raise ValueError("kind: ema needs decay, for example 0.999")
        if self.kind == "uniform" and self.decay is not None:
            raise ValueError("decay is only for kind: ema; leave it out")
        return self
