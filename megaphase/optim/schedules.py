"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from megaphase.config import LearningRateConfig


def learning_rate(config: LearningRateConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (0-based) of a phase of `steps` steps.

    Where the schedule has a length of its own, the phase is the part of it that begins at
    `first_step`. Warm-up rises linearly and reaches `peak` at the schedule's step `warmup_steps`;
    all but `constant` and `inverse_sqrt` arrive at `final` with the schedule's last step, and a
    phase that goes on beyond it stays there.

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
        start = max(start, steps - config.decay_steps)
    progress = _progress(step, start, steps - 1)
    falling = 1 - progress
    if config.schedule == "cosine":
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    return config.final + (config.peak - config.final) * falling


def _progress(step: int, start: int, last: int) -> float:
    """0 up to `start`, 1 at `last`, linear between."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / max(1, last - start))
