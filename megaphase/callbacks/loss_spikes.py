"""Signs of illness in a run: steps that are not finite, and losses that jump."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

# Losses of the same phase that a new one is compared with, and how many it takes to compare.
WINDOW = 100
ENOUGH = 20


class LossSpikeDetector:
    """Remembers the newest losses of a phase; its state is plain JSON values."""

    def __init__(self, spike_deviations: float) -> None:
        """spike_deviations: how many standard deviations above the mean are a spike; 0: none is."""
        self._spike_deviations = spike_deviations
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped_in_a_row = 0

    def begin_phase(self) -> None:
        """Another mixture has other losses."""
        self._losses.clear()

    def spike(self, loss: float) -> float | None:
        """Take in the loss of a step; the mean of those before if this one is far above it."""
        self.skipped_in_a_row = 0
        before = list(self._losses)
        self._losses.append(loss)
        if not self._spike_deviations or len(before) < ENOUGH:
            return None
        mean = math.fsum(before) / len(before)
        variance = math.fsum((each - mean) ** 2 for each in before) / len(before)
        limit = mean + self._spike_deviations * math.sqrt(variance)
        return mean if loss > limit else None

    def skip(self) -> None:
        """Count a step that was left out."""
        self.skipped_in_a_row += 1

    def state_dict(self) -> dict[str, Any]:
        """All that it knows."""
        return {"losses": list(self._losses), "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._losses = deque(state["losses"], WINDOW)
        self.skipped_in_a_row = state["skipped_in_a_row"]
