"""Makes the record of each training step from its figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from megaphase.callbacks.callback import StepRecord, StepSeconds
from megaphase.callbacks.throughput import ThroughputReference
from megaphase.training.step_result import StepResult
from megaphase.training.train_state import TrainState


@dataclass(frozen=True)
class _Step:
    """A step that has been launched; state: after it. samples, tokens: of its global batch."""

    result: StepResult
    state: TrainState
    phase: str
    learning_rate: float
    samples: int
    tokens: int
    seconds: StepSeconds


class StepRecorder:
    """Reads the figures of a step at its end or, with `one_later`, once the next one is launched.

    So a GPU has work while the host reads, writes metrics and prepares a step. The order of the
    records is the same, and `finish` gives the newest one before anything that depends on it:
    validations, checkpoints, the end of a phase and of the run.
    """

    def __init__(
        self, tasks: Sequence[str], throughput: ThroughputReference, *, one_later: bool
    ) -> None:
        self._tasks, self._throughput, self._one_later = list(tasks), throughput, one_later
        self._newest: _Step | None = None
        self._launched = 0.0

    def add(
        self,
        result: StepResult,
        state: TrainState,
        phase: str,
        learning_rate: float,
        *,
        samples: int,
        tokens: int,
        began: float,
        data_wait: float,
        save: float,
    ) -> StepRecord | None:
        """Take a step whose kernels have been launched; the record that is due, if there is one.

        Args:
            state: after the step.
            samples, tokens: of its global batch.
            began: when its batch was there, in seconds of `time.perf_counter`.
            data_wait, save: see StepSeconds.
        """
        before, now = self._newest, time.perf_counter()
        # Two steps that overlap: from one launch to the next, so that no time counts twice.
        train = now - began if before is None else now - self._launched - data_wait - save
        seconds = StepSeconds(data_wait, train, save)
        self._newest = _Step(result, state, phase, learning_rate, samples, tokens, seconds)
        self._launched = now
        if not self._one_later:
            return self.finish()
        return None if before is None else self._record(before)

    def finish(self) -> StepRecord | None:
        """The record of the newest step, whose end is waited for; None if it has been given."""
        step, self._newest = self._newest, None
        if step is None:
            return None
        began = time.perf_counter()
        step.result.wait()
        waited = time.perf_counter() - began
        return self._record(step, waited)

    def _record(self, step: _Step, waited: float = 0.0) -> StepRecord:
        """waited: seconds after its launch for its end."""
        losses, state, seconds = step.result.losses, step.state, step.seconds
        seconds = StepSeconds(seconds.data_wait, seconds.train + waited, seconds.save)
        speed = step.tokens / seconds.total
        return StepRecord(
            step=state.step,
            phase=step.phase,
            phase_number=state.phase,
            phase_step=state.phase_step,
            starts=state.starts,
            tokens=state.tokens,
            samples=step.samples,
            batch_tokens=step.tokens,
            loss=losses.mean,
            loss_by_task=losses.by_task(self._tasks),
            loss_sums=dict(zip(self._tasks, losses.loss_sums.tolist(), strict=True)),
            scored_tokens=dict(zip(self._tasks, losses.tokens.int().tolist(), strict=True)),
            learning_rate=step.learning_rate,
            grad_norm=step.result.grad_norm,
            applied=step.result.applied,
            is_spike=step.result.is_spike,
            exceeded=step.result.exceeded,
            seconds=seconds,
            tokens_per_second=speed,
            mfu=self._throughput.mfu(speed, state.phase),
        )
