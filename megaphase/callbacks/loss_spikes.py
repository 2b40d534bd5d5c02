"""Steps whose loss is far above those before, and steps that were skipped."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from megaphase.callbacks.callback import Callback, StepRecord
from megaphase.fault_tolerance.config import FaultsConfig
from megaphase.utils.errors import RunError
from megaphase.utils.spike_words import spike_in_words

# Losses of the same phase that a new one is compared with, and how many it takes to compare.
WINDOW = 100
ENOUGH = 20


class LossSpikeDetector(Callback):
    """Remembers the newest losses of a phase; reports loss spikes and skipped steps."""

    state_key: ClassVar[str] = "losses"

    def __init__(self, faults: FaultsConfig, trace_path: Callable[[int], Path]) -> None:
        """trace_path: where BatchDump writes down which samples a step saw."""
        self._faults, self._trace_path = faults, trace_path
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped_in_a_row = 0
        self._left_out = 0  # in the phase

    def on_phase_begin(self, number: int, name: str) -> None:
        """Another mixture has other losses."""
        self._losses.clear()
        self._left_out = 0

    def on_step_end(self, record: StepRecord) -> None:
        if record.is_spike:
            self._report_left_out(record)
            return
        if not record.applied:
            self._report_skipped(record)
            return
        mean = self.spike(record.loss)
        if mean is not None:
            self._report_spike(record, mean)

    def has_skipped_too_many(self) -> bool:
        """Return whether more steps in a row were not finite than `faults.skip_batches` allows, or
        more steps of the phase were left out than `faults.skip_spikes` allows."""
        return self.skipped_in_a_row > self._faults.skip_batches or self._has_left_out_too_many()

    def _has_left_out_too_many(self) -> bool:
        spikes = self._faults.skip_spikes
        return spikes is not None and self._left_out > spikes.most

    def stop(self, record: StepRecord) -> RunError:
        """Report that the run ends because of that; the error with which it ends."""
        step, phase = record.step, record.phase
        if record.is_spike:
            return self._stop_at_spike(record)
        self.run.event(step, "divergence_stop", phase=phase, kind="not_finite")
        number = self.skipped_in_a_row
        steps = "1 step" if number == 1 else f"{number} steps in a row"
        return RunError(
            f"{phase} step {step:,}: {_not_finite(record)} is not finite, in {steps} "
            f"(faults.skip_batches: {self._faults.skip_batches}); what the step saw: "
            f"{self._trace_path(step)}; resume from the last checkpoint with other data, or begin "
            "again with a lower peak learning rate or a longer warm-up"
        )

    def _report_skipped(self, record: StepRecord) -> None:
        self.skip()
        step, phase, trace = record.step, record.phase, str(self._trace_path(record.step))
        tasks = _not_finite_tasks(record)
        self.run.event(step, "step_skipped", phase=phase, tasks=tasks, trace=trace)
        if not self.has_skipped_too_many():
            self.run.say(
                f"{phase} step {step:,}  skipped: {_not_finite(record)} is not finite "
                f"({self.skipped_in_a_row} in a row, {self._faults.skip_batches} allowed); what "
                f"the step saw: {trace}"
            )

    def _report_left_out(self, record: StepRecord) -> None:
        self._left_out += 1
        step, phase, trace = record.step, record.phase, str(self._trace_path(record.step))
        figures = {
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "exceeded": record.exceeded,
        }
        self.run.event(step, "spike_skipped", phase=phase, **figures, trace=trace)
        spikes = self._faults.skip_spikes
        most = self._left_out if spikes is None else spikes.most
        if not self._has_left_out_too_many():
            self.run.say(
                f"{phase} step {step:,}  left out as a spike: {_why_left_out(record)} "
                f"({self._left_out:,} in this phase, {most:,} allowed); what the step saw: {trace}"
            )

    def _stop_at_spike(self, record: StepRecord) -> RunError:
        """Report that the run ends since too many steps were left out; the error."""
        step, phase = record.step, record.phase
        self.run.event(step, "divergence_stop", phase=phase, kind="spikes")
        return RunError(
            f"{phase} step {step:,}: {self._left_out:,} steps of this phase were left out as "
            "spikes, more than faults.skip_spikes.most allows; the last one: "
            f"{_why_left_out(record)}; what it saw: {self._trace_path(step)}; raise "
            "faults.skip_spikes.deviations or most, or lower the peak learning rate"
        )

    def _report_spike(self, record: StepRecord, mean: float) -> None:
        step, phase, loss = record.step, record.phase, record.loss
        trace = str(self._trace_path(step))
        self.run.event(step, "loss_spike", phase=phase, loss=loss, mean_before=mean, trace=trace)
        self.run.say(
            f"{phase} step {step:,}  loss spike: {loss:.4f}, before {mean:.4f}; what the step "
            f"saw: {trace}"
        )

    def spike(self, loss: float) -> float | None:
        """Take in the loss of a step; the mean of those before if this one is far above it."""
        self.skipped_in_a_row = 0
        before = list(self._losses)
        self._losses.append(loss)
        if not self._faults.spike_deviations or len(before) < ENOUGH:
            return None
        mean = math.fsum(before) / len(before)
        variance = math.fsum((each - mean) ** 2 for each in before) / len(before)
        limit = mean + self._faults.spike_deviations * math.sqrt(variance)
        return mean if loss > limit else None

    def skip(self) -> None:
        """Count a step that was skipped."""
        self.skipped_in_a_row += 1

    def state_dict(self) -> dict[str, Any]:
        state = {"losses": list(self._losses), "skipped_in_a_row": self.skipped_in_a_row}
        return state | ({"left_out": self._left_out} if self._left_out else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses = deque(state["losses"], WINDOW)
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self._left_out = state.get("left_out", 0)


def _why_left_out(record: StepRecord) -> str:
    # Nothing is too large where only the sums of another rank were, which differ in a last bit.
    figures = f"loss {record.loss:.4f}, gradient norm {record.grad_norm:.4g}"
    return spike_in_words(record.exceeded) or figures


def _not_finite_tasks(record: StepRecord) -> list[str]:
    return [task for task, total in record.loss_sums.items() if not math.isfinite(total)]


def _not_finite(record: StepRecord) -> str:
    """Names the part of a skipped step that is not finite."""
    tasks = _not_finite_tasks(record)
    return f"the loss of {', '.join(tasks)}" if tasks else "the gradient"
