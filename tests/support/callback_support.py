"""Step records for the tests of callbacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megaphase.callbacks.callback import StepRecord, StepSeconds

_STEP = StepRecord(
    step=1,
    phase="only",
    phase_number=0,
    phase_step=1,
    starts=(0, 0),
    tokens=64,
    samples=4,
    batch_tokens=64,
    loss=2.0,
    loss_by_task={"en": 1.5, "hi": 3.0},
    loss_sums={"en": 63.0, "hi": 66.0},
    scored_tokens={"en": 42, "hi": 22},
    learning_rate=1e-3,
    grad_norm=0.5,
    applied=True,
    seconds=StepSeconds(0.0, 0.5, 0.0),
    tokens_per_second=128.0,
    mfu=None,
)


def step_record(step: int, **changes: Any) -> StepRecord:
    """Return the record of this step of the first phase."""
    return replace(_STEP, step=step, phase_step=step, tokens=64 * step, **changes)
