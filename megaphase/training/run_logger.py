"""What a run writes down and shows: on rank 0 alone, so that the loop need not ask who it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megaphase.callbacks.display import StepFigures, TrainingDisplay
from megaphase.callbacks.metrics_file import MetricsLog
from megaphase.training.engine import StepResult
from megaphase.training.evaluator import HeldOutLoss
from megaphase.training.train_state import TrainState


@dataclass(frozen=True)
class StepSeconds:
    """How long a step took: waiting for its batch, training, and before it for a save's copy."""

    data_wait: float
    train: float
    save: float

    @property
    def total(self) -> float:
        return self.data_wait + self.train + self.save


@dataclass(frozen=True)
class ThroughputReference:
    """What speeds are measured by.

    Attributes:
        tokens_per_step: of the global batch.
        flops_per_token: of a forward and backward pass.
        peak_flops: of all devices together, None where it is not known.
    """

    tokens_per_step: int
    flops_per_token: int
    peak_flops: float | None


class RunLogger:
    """metrics.jsonl, TensorBoard and the display; does nothing where it is given neither."""

    def __init__(
        self,
        metrics: MetricsLog | None,
        display: TrainingDisplay | None,
        tasks: list[str],
        throughput_reference: ThroughputReference,
    ) -> None:
        self._metrics, self._display = metrics, display
        self._tasks, self._throughput_reference = tasks, throughput_reference

    def step(
        self, phase: str, at: TrainState, result: StepResult, rate: float, seconds: StepSeconds
    ) -> None:
        """A training step, also one that was left out; `at`: where it has led to."""
        if self._metrics is None or self._display is None:
            return
        tokens = self._throughput_reference.tokens_per_step
        loss = result.losses.mean
        row = {
            "step": at.step,
            "phase": phase,
            "phase_step": at.phase_step,
            "tokens": at.tokens,
            "loss": loss,
            "loss_by_task": result.losses.by_task(self._tasks),
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "step_seconds": seconds.total,
            "data_wait_seconds": seconds.data_wait,
            "save_seconds": seconds.save,
            "tokens_per_second": tokens / seconds.total,
            "mfu": self._mfu(tokens / seconds.total),
        }
        if not result.applied:
            row["skipped"] = True
        self._metrics.write(row)
        self._display.step(StepFigures(phase, at.step, loss, rate, tokens, seconds.total))

    def validation(
        self,
        phase: str,
        step: int,
        losses: Mapping[str, HeldOutLoss],
        gaps: Mapping[str, float | None],
    ) -> None:
        """Held-out losses by task; where it was trained on, how far above the training loss."""
        if self._metrics is None or self._display is None:
            return
        figures = {
            task: asdict(loss) | ({} if gaps[task] is None else {"gap": gaps[task]})
            for task, loss in losses.items()
        }
        self._metrics.write({"step": step, "phase": phase, "validation": figures})
        shown = {task: loss.loss for task, loss in losses.items()}
        self._display.validation(phase, step, shown)

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Something that happened after `step` steps of the run."""
        if self._metrics is not None:
            self._metrics.write({"step": step, "event": event, **facts})

    def say(self, text: str) -> None:
        """Show a sentence."""
        if self._display is not None:
            self._display.say(text)

    def sync(self) -> dict[str, Any]:
        """Force all rows to the disk; see MetricsLog. Empty on other ranks."""
        return self._metrics.sync() if self._metrics is not None else {}

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self._throughput_reference.peak_flops is None:
            return None
        return (
            self._throughput_reference.flops_per_token
            * tokens_per_second
            / self._throughput_reference.peak_flops
        )
