"""The sampling rates of a phase in which they change, as `plan.json` has them."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict


class RatesOverSteps(BaseModel):
    """Mean rates in ranges of a phase's steps.

    steps, samples: of the phase before each range, and of the whole phase
    rates:          by task, in each of the ranges
    """

    model_config = ConfigDict(frozen=True)

    steps: list[int]
    samples: list[int]
    rates: dict[str, list[float]]

    def until(self, steps: int) -> Self:
        """Return the rates of the phase's first steps alone."""
        if steps >= self.steps[-1]:
            return self
        ranges = int(np.searchsorted(self.steps, steps))
        samples = round(float(np.interp(steps, self.steps, self.samples)))
        return self.model_copy(
            update={
                "steps": [*self.steps[:ranges], steps],
                "samples": [*self.samples[:ranges], samples],
                "rates": {task: rates[:ranges] for task, rates in self.rates.items()},
            }
        )

    def samples_of(self, task: str) -> float:
        """Return the sum of a task's rates over the samples."""
        return float(
            np.dot(self.rates.get(task, np.zeros(len(self.steps) - 1)), np.diff(self.samples))
        )
