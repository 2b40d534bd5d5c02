"""The `faults` section of a run file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megaphase.config.fields import (
    Few,
    FewOrZero,
    FractionBelow1,
    Positive,
    PositiveOrZero,
    Section,
)

Seconds = Annotated[float, Field(ge=0.1, le=1e8)]


class SkipSpikesConfig(Section):
    """Steps whose loss or gradient norm is far above its running mean are left out, as those that
    are not finite are: [reliability.md](reliability.md#leaving-out-spikes) says how. The statistics
    are of the steps of the phase that were applied."""

    deviations: Positive
    """By how many standard deviations the loss or the gradient norm is above its running mean in a
    step that is left out."""
    decay: FractionBelow1 = 0.99
    """By how much a step's weight in the mean and the variance decays with every further one: they
    are of about 1 / (1 - decay) steps."""
    after_steps: Few = 100
    """Steps of the phase that must have been applied before one is left out."""
    most_in_a_row: Few = 3
    """How many steps in a row are left out at most; the next one is applied, and becomes part of
    the statistics."""
    most: Few = 100
    """How many steps of a phase are left out at most; one more ends the run."""


class FaultsConfig(Section):
    """What a run does about faults; all of it is explained in [reliability.md](reliability.md)."""

    skip_batches: FewOrZero = 3
    """How many steps in a row whose loss or gradient is not finite are skipped; one more ends the
    run."""
    spike_deviations: PositiveOrZero = 6.0
    """A step whose loss is this many standard deviations above its running mean is reported with
    its samples; 0 never reports."""
    skip_spikes: SkipSpikesConfig | None = None
    """Which loss spikes are left out of training; none if left out."""
    stop_on_divergence: bool = True
    """Whether a run whose loss has risen far and stays there, or does not move, ends with exit code
    1 after a checkpoint; `false` continues to train. It is reported in both cases: see
    [reliability.md](reliability.md#divergence)."""
    compare_copies_steps: FewOrZero = 100
    """Steps between comparisons of the parameters of which several ranks hold a copy (replicated
    over tensor-parallel ranks, or over all without ZeRO), beside those before each validation and
    checkpoint: the run ends if copies are unequal; 0 never compares."""
    silent_seconds: Seconds = 30.0
    """Seconds without a heartbeat after which a process counts as dead: all others end and name
    it."""
    stalled_seconds: Seconds = 900.0
    """Seconds without progress, such as a micro-batch, on any process after which the run counts as
    hanging: all processes end and say where each of them is."""
