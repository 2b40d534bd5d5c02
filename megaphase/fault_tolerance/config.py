"""The `faults` section of a run file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megaphase.config.fields import FewOrZero, PositiveOrZero, Section

Seconds = Annotated[float, Field(ge=0.1, le=1e8)]


class FaultsConfig(Section):
    """What a run does about faults.

    skip_batches: steps in a row whose loss or gradient is not finite that are left out.
    spike_deviations: how far above the running mean loss a step is reported; 0 never.
    stop_on_divergence: whether a run ends whose loss has risen far and stays there, or is stuck.
    silent_seconds: after so long without a sign of life a rank counts as dead.
    stalled_seconds: after so long without progress on any rank the run counts as hanging.
    """

    skip_batches: FewOrZero = 3
    spike_deviations: PositiveOrZero = 6.0
    stop_on_divergence: bool = True
    silent_seconds: Seconds = 30.0
    stalled_seconds: Seconds = 900.0
