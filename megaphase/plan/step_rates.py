"""The sampling rates of a phase over its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megaphase.plan.index import PhaseIndex
from megaphase.plan.mixture import TaskSupply, rate_pieces
from megaphase.plan.spec import PhaseSpec

# Of the rates in plan.json: at most so many ranges of a phase's steps, and numbers in all.
MOST_RANGES = 64
MOST_RATES = 1 << 19


class StepRates:
    """The effective rates of all tasks over the steps of a phase."""

    def __init__(
        self, spec: PhaseSpec, stored: PhaseIndex, supply: Callable[[], Mapping[str, TaskSupply]]
    ) -> None:
        """
        Args:
            supply: returns the supply of the tasks at the phase's start; called where rates change.
        """
        self._spec, self._stored, self._supply = spec, stored, supply

    def in_steps(self, steps: np.ndarray) -> np.ndarray:
        """Return the mean rate of every task over the samples of steps, float64 [points, tasks].

        steps: int64 [points], 0-based in the phase
        """
        if not self._spec.mixture.changes:
            return np.tile(np.array(self._stored.rates), (len(steps), 1))
        return self._means(steps, steps + 1)

    def summary(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Return what plan.json has of a phase whose rates change: {} of another one.

        `rates_over_steps` has ranges of the phase's steps: `steps` and `samples` before each of
        them, and of the whole phase, and for every task its mean rates in the ranges.
        """
        spec = self._spec
        if not spec.mixture.changes:
            return {}
        ranges = max(1, min(MOST_RANGES, spec.steps, MOST_RATES // len(tasks)))
        steps = np.arange(ranges + 1) * spec.steps // ranges
        rates = self._means(steps[:-1], steps[1:])
        return {
            "rates_over_steps": {
                "steps": steps.tolist(),
                "samples": self._samples_before(steps).tolist(),
                "rates": dict(zip(tasks, rates.T.tolist(), strict=True)),
            }
        }

    def _means(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Return the mean rates in the steps [first, last), float64 [points, tasks]."""
        pieces = rate_pieces(
            self._spec.mixture, self._supply(), self._stored.samples, self._spec.where
        )
        begin, end = self._samples_before(first), self._samples_before(last)
        sums = pieces.counts_before(end) - pieces.counts_before(begin)
        means: np.ndarray = sums / (end - begin)[:, np.newaxis]
        return means

    def _samples_before(self, steps: np.ndarray) -> np.ndarray:
        batch = self._spec.batch
        return np.array([batch.samples_before(step) for step in steps.tolist()], np.int64)
