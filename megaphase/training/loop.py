"""The phases of a run, one after the other: train, measure, save, switch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megaphase.checkpoint.store import CheckpointStore
from megaphase.config import PhaseConfig, RunConfig
from megaphase.errors import RunError
from megaphase.plan.dataset import Batch, StepReader
from megaphase.plan.plan import Plan
from megaphase.training.engine import Engine, StepResult
from megaphase.training.evaluation import HeldOutEvaluator, HeldOutLoss
from megaphase.training.metrics import MetricsLog
from megaphase.training.progress import Display, StepFigures
from megaphase.training.schedules import learning_rate


@dataclass(frozen=True)
class Position:
    """Where a run stands: steps done in the phase, and over the whole run."""

    phase: int = 0
    phase_step: int = 0
    step: int = 0


@dataclass(frozen=True)
class Observer:
    """Rank 0's record and display of the run."""

    metrics: MetricsLog
    display: Display


@dataclass(frozen=True)
class _StepSeconds:
    """How long a step took, and how much of it was waiting for its batch."""

    data_wait: float
    total: float


class TrainingLoop:
    """Takes a run from a position to its end; all ranks go through it in step."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        engine: Engine,
        evaluator: HeldOutEvaluator,
        store: CheckpointStore,
        observer: Observer | None,
        *,
        filler: int,
        flops_per_token: int,
        peak_flops: float | None,
        checkpoint_facts: dict[str, Any],
    ) -> None:
        """
        Args:
            observer: on rank 0; None elsewhere.
            filler: token id for inputs that have no target.
            flops_per_token: of a forward and backward pass.
            peak_flops: of all devices together, None where it is not known.
            checkpoint_facts: what every checkpoint's state says beside the position.
        """
        self._config, self._plan, self._engine = config, plan, engine
        self._evaluator, self._store, self._observer = evaluator, store, observer
        self._filler = filler
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._checkpoint_facts = checkpoint_facts
        self._tokens_per_step = plan.spec.samples_per_step * plan.spec.seq_len
        self._last_evaluation: tuple[int, dict[str, HeldOutLoss]] | None = None

    def run(self, position: Position) -> None:
        """Train from `position` to the end of the last phase.

        Raises:
            RunError: the loss is not a finite number.
        """
        for number in range(position.phase, len(self._config.phases)):
            first = position.phase_step if number == position.phase else 0
            before = sum(phase.steps for phase in self._plan.phases[:number])
            if first == 0:
                self._begin_phase(number, before)
            self._train_phase(number, first, before)

    def _begin_phase(self, number: int, step: int) -> None:
        """The switch: the weights stay; with `reset`, nothing else of the phase before does."""
        phase = self._config.phases[number]
        self._event(step, "phase_start", phase=phase.name)
        if number > 0 and phase.optimizer_state == "reset":
            self._engine.reset_optimizer_state()
            self._event(step, "optimizer_reset", phase=phase.name)
        self._validate(phase, step)

    def _train_phase(self, number: int, first: int, before: int) -> None:
        phase, steps = self._config.phases[number], self._plan.phases[number].steps
        topology = self._engine.topology
        reader = StepReader(
            self._plan,
            number,
            rank=topology.data_rank,
            ranks=topology.data_size,
            filler=self._filler,
        )
        for phase_step, batch in enumerate(reader.steps(first, steps), start=first):
            step, done = before + phase_step + 1, phase_step + 1
            self._train_step(phase, phase_step, steps, step, batch, reader.wait_seconds)
            last = done == steps
            if last or step % self._config.validation.every_steps == 0:
                self._validate(phase, step)
            if last:
                self._event(step, "phase_end", phase=phase.name)
            if last or step % self._config.checkpoint.every_steps == 0:
                self._save(Position(number, done, step), permanent=last)

    def _train_step(
        self,
        phase: PhaseConfig,
        phase_step: int,
        steps: int,
        step: int,
        batch: Batch,
        wait_seconds: float,
    ) -> None:
        rate = learning_rate(phase.learning_rate, phase_step, steps)
        started = time.perf_counter()
        result = self._engine.train_step(batch, rate)
        train_seconds = time.perf_counter() - started
        if not math.isfinite(result.losses.mean):
            raise RunError(
                f"{phase.name} step {step:,}: the loss is {result.losses.mean}; start again from "
                "the last checkpoint with a lower peak learning rate or a longer warm-up"
            )
        if self._observer is None:
            return
        seconds = _StepSeconds(wait_seconds, wait_seconds + train_seconds)
        row = self._training_row(phase, phase_step, step, result, rate, seconds)
        self._observer.metrics.write(row)
        self._observer.display.step(
            StepFigures(phase.name, step, row["loss"], rate, self._tokens_per_step, seconds.total)
        )

    def _training_row(
        self,
        phase: PhaseConfig,
        phase_step: int,
        step: int,
        result: StepResult,
        rate: float,
        seconds: _StepSeconds,
    ) -> dict[str, Any]:
        tokens_per_second = self._tokens_per_step / seconds.total
        mfu = None
        if self._peak_flops is not None:
            mfu = self._flops_per_token * tokens_per_second / self._peak_flops
        return {
            "step": step,
            "phase": phase.name,
            "phase_step": phase_step + 1,
            "tokens": step * self._tokens_per_step,
            "loss": result.losses.mean,
            "loss_by_task": result.losses.by_task(self._plan.tasks),
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "step_seconds": seconds.total,
            "data_wait_seconds": seconds.data_wait,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
        }

    def _validate(self, phase: PhaseConfig, step: int) -> None:
        """Measure the held-out losses, once for both phases that meet at a switch."""
        if self._last_evaluation is None or self._last_evaluation[0] != step:
            self._last_evaluation = step, self._evaluator.evaluate()
        found = self._last_evaluation[1]
        if self._observer is None:
            return
        figures = {task: asdict(loss) for task, loss in found.items()}
        self._observer.metrics.write({"step": step, "phase": phase.name, "validation": figures})
        losses = {task: loss.loss for task, loss in found.items()}
        self._observer.display.validation(phase.name, step, losses)

    def _save(self, position: Position, *, permanent: bool) -> None:
        # The event comes first, so that it lies within the bytes that the checkpoint keeps.
        phase = self._config.phases[position.phase].name
        self._event(position.step, "checkpoint", phase=phase)
        state = {
            **self._checkpoint_facts,
            **asdict(position),
            "phase_name": phase,
            "permanent": permanent,
            "metrics_bytes": self._observer.metrics.sync() if self._observer else 0,
        }
        folder = self._store.save(
            position.step, self._engine.save, state, keep=self._config.checkpoint.keep
        )
        self._say(lambda: f"{phase} step {position.step:,}  checkpoint: {folder}")

    def _event(self, step: int, event: str, **facts: Any) -> None:
        if self._observer is not None:
            self._observer.metrics.write({"step": step, "event": event, **facts})
        if event == "optimizer_reset":
            self._say(lambda: f"{facts['phase']} step {step:,}  optimizer state reset")

    def _say(self, text: Callable[[], str]) -> None:
        if self._observer is not None:
            self._observer.display.say(text())
