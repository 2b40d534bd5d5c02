"""The phases of a run, one after the other: train, measure, save, switch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np

from megaphase.callbacks.batch_dump import BatchDump
from megaphase.callbacks.divergence_monitor import DivergenceWatch
from megaphase.callbacks.early_stopping import EarlyStopping
from megaphase.callbacks.loss_spikes import LossSpikeDetector
from megaphase.callbacks.profiling.recorder import StepProfiler
from megaphase.checkpoint.state import best_name, full_name
from megaphase.config.run import RunConfig
from megaphase.distributed.control_group import ControlGroup
from megaphase.fault_tolerance.stop_signals import StopSignals
from megaphase.fault_tolerance.watchdog import Watchdog
from megaphase.optim.schedules import learning_rate
from megaphase.plan.dataset import Batch, StepReader
from megaphase.plan.plan import Plan
from megaphase.plan.run_history import RunHistory
from megaphase.training.checkpointer import Checkpointer
from megaphase.training.engine import Engine, StepResult
from megaphase.training.evaluator import HeldOutEvaluator, HeldOutLoss
from megaphase.training.resume_point import ResumePoint
from megaphase.training.run_logger import RunLogger, StepSeconds
from megaphase.training.train_state import TrainState
from megaphase.utils.errors import RunError, Stopped


@dataclass(frozen=True)
class Guards:
    """What watches over a run beside the loop."""

    control_group: ControlGroup
    watchdog: Watchdog
    signals: StopSignals
    monitor: EarlyStopping
    losses: LossSpikeDetector
    divergence: DivergenceWatch
    history: RunHistory
    trace: BatchDump
    profiler: StepProfiler
    resume_point: ResumePoint


class TrainingLoop:
    """Takes a run from a position to its end; all ranks go through it in step."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        engine: Engine,
        evaluator: HeldOutEvaluator,
        saver: Checkpointer,
        record: RunLogger,
        guards: Guards,
        *,
        pad_token_id: int,
    ) -> None:
        """pad_token_id: token id for inputs that have no target."""
        self._config, self._plan, self._engine = config, plan, engine
        self._evaluator, self._saver, self._record = evaluator, saver, record
        self._guards, self._pad_token_id = guards, pad_token_id
        self._last_evaluation: tuple[int, dict[str, HeldOutLoss]] | None = None
        self._save_seconds = 0.0

    def run(self, position: TrainState, *, branched: bool) -> None:
        """Train from `position` to the end of the last phase.

        branched: whether the weights are those of another run, whose optimizer state the first
            phase keeps or resets.

        Raises:
            RunError: too many steps in a row are not finite, the loss has diverged, or a
                checkpoint cannot be written.
            Stopped: a signal came to some rank; the state is saved.
        """
        while position.phase < len(self._config.phases):
            if position.phase_step == 0:
                self._begin_phase(position, switched=branched or position.phase > 0)
            position = self._train_phase(position)
        with self._holding_up(position):
            self._saver.finish()

    def _begin_phase(self, at: TrainState, *, switched: bool) -> None:
        """The switch: the weights stay; with `reset`, nothing else of the phase before does."""
        phase = self._config.phases[at.phase]
        starts = dict(zip(self._plan.tasks, at.starts, strict=True))
        self._guards.history.begin_phase(phase.name, at.step, starts)
        self._record.event(at.step, "phase_start", phase=phase.name)
        if switched and phase.optimizer_state == "reset":
            self._engine.state.reset()
            self._record.event(at.step, "optimizer_reset", phase=phase.name)
            self._record.say(f"{phase.name} step {at.step:,}  optimizer state reset")
        self._guards.monitor.begin_phase(at.phase)
        self._guards.losses.begin_phase()
        self._validate(at, saved_anyway=False)
        self._guards.divergence.begin_phase(self._held_out())

    def _train_phase(self, at: TrainState) -> TrainState:
        """To the phase's end; returns where the next one begins."""
        steps, grid = self._plan.phases[at.phase].steps, self._engine.grid
        reader = StepReader(
            self._plan,
            at.phase,
            rank=grid.data_rank,
            ranks=grid.data_size,
            pad_token_id=self._pad_token_id,
            starts=np.array(at.starts, np.int64),
        )
        for batch in reader.steps(at.phase_step, steps):
            at = at.after_step()
            self._train_step(at, steps, batch, reader.wait_seconds)
            reason = self._validate_and_save_if_due(at, at.phase_step == steps)
            if reason is not None:
                return self._end_phase(at, reason)
            self._agree(at)
            self._guards.watchdog.at(f"reading the batch of step {at.step + 1:,}")
        raise AssertionError("the last step of a phase ends it")

    def _train_step(self, at: TrainState, steps: int, batch: Batch, wait_seconds: float) -> None:
        phase = self._config.phases[at.phase]
        rate = learning_rate(phase.learning_rate, at.phase_step - 1, steps)
        self._guards.watchdog.at(f"in step {at.step:,}")
        with self._guards.profiler.step(at.step, wait_seconds):
            started = time.perf_counter()
            result = self._engine.train_step(batch, rate, at.step)
            train_seconds = time.perf_counter() - started
        seconds = StepSeconds(wait_seconds, train_seconds, self._save_seconds)
        self._save_seconds = 0.0
        self._record.step(phase.name, at, result, rate, seconds)
        self._guards.resume_point.note_step(at.step)
        if result.applied:
            self._on_step_applied(at, result, rate)
        else:
            self._on_step_skipped(at, result)

    def _on_step_applied(self, at: TrainState, result: StepResult, rate: float) -> None:
        tasks = self._plan.tasks
        sums = dict(zip(tasks, result.losses.loss_sums.tolist(), strict=True))
        tokens = dict(zip(tasks, result.losses.tokens.int().tolist(), strict=True))
        self._guards.monitor.add_training_losses(sums, tokens)
        self._guards.divergence.observe(at, sums, tokens, result.grad_norm, rate)
        mean = self._guards.losses.spike(result.losses.mean)
        if mean is None:
            return
        phase, loss = self._config.phases[at.phase].name, result.losses.mean
        trace = self._guards.trace.write(at)
        self._record.event(
            at.step, "loss_spike", phase=phase, loss=loss, mean_before=mean, trace=trace
        )
        self._record.say(
            f"{phase} step {at.step:,}  loss spike: {loss:.4f}, before {mean:.4f}; what the step "
            f"saw: {trace}"
        )

    def _on_step_skipped(self, at: TrainState, result: StepResult) -> None:
        """A step whose gradient is not finite changed nothing; too many in a row are the end."""
        self._guards.losses.skip()
        self._guards.history.skip(at.step)
        in_a_row, allowed = self._guards.losses.skipped_in_a_row, self._config.faults.skip_batches
        phase, trace = self._config.phases[at.phase].name, self._guards.trace.write(at)
        tasks = [
            name
            for name, total in zip(self._plan.tasks, result.losses.loss_sums.tolist(), strict=True)
            if not math.isfinite(total)
        ]
        what = f"the loss of {', '.join(tasks)}" if tasks else "the gradient"
        self._record.event(at.step, "step_skipped", phase=phase, tasks=tasks, trace=trace)
        if in_a_row > allowed:
            with self._holding_up(at):
                self._saver.finish()
            self._record.event(at.step, "divergence_stop", phase=phase, kind="not_finite")
            steps = "1 step" if in_a_row == 1 else f"{in_a_row} steps in a row"
            raise RunError(
                f"{phase} step {at.step:,}: {what} is not finite, in {steps} "
                f"(faults.skip_batches: {allowed}); what the step saw: {trace}; go on from the "
                "last checkpoint with other data, or begin again with a lower peak learning rate "
                "or a longer warm-up"
            )
        self._record.say(
            f"{phase} step {at.step:,}  left out: {what} is not finite ({in_a_row} in a row, "
            f"{allowed} allowed); what the step saw: {trace}"
        )

    def _validate_and_save_if_due(self, at: TrainState, last: bool) -> str | None:
        """Measure and save where that is due; why the phase ends here, or None."""
        saving = at.step % self._config.checkpoint.every_steps == 0
        reason = "its length is reached" if last else None
        if last or at.step % self._config.validation.every_steps == 0:
            # At the end of a phase a checkpoint follows in any case.
            reason = self._validate(at, saved_anyway=saving or last) or reason
        if saving and reason is None:
            self._save(at)
        return reason

    def _end_phase(self, at: TrainState, reason: str) -> TrainState:
        phase = self._config.phases[at.phase].name
        self._guards.history.end_phase(phase, at.step, reason)
        self._record.event(at.step, "phase_end", phase=phase, reason=reason)
        if at.phase_step < self._plan.phases[at.phase].steps:
            self._record.say(f"{phase} step {at.step:,}  the phase ends: {reason}")
        following = at.next_phase(at.used(self._plan))
        self._save(following, permanent=True)
        ends = self._guards.divergence.is_over(phase_ends=True)
        if self._guards.control_group.largest(int(ends))[0]:
            self._end_diverged(following, phase)
        return following

    def _validate(self, at: TrainState, *, saved_anyway: bool) -> str | None:
        """Measure the held-out losses, once for both phases that meet at a switch.

        saved_anyway: whether a whole checkpoint of this step follows; the best weights are then
            in that one.

        Returns why the phase is over, or None.
        """
        phase = self._config.phases[at.phase].name
        if self._last_evaluation is None or self._last_evaluation[0] != at.step:
            measuring = partial(self._guards.watchdog.at, f"measuring after step {at.step:,}")
            self._last_evaluation = at.step, self._evaluator.evaluate(measuring)
        found, losses = self._last_evaluation[1], self._held_out()
        verdict = self._guards.monitor.observe(at.step, losses)
        self._record.validation(phase, at.step, found, verdict.gaps)
        if verdict.improved:
            self._record.event(at.step, "best", phase=phase, of=verdict.improved)
            name = full_name(at.step) if saved_anyway else best_name(at.step)
            self._saver.note_best(verdict.improved, name)
            if not saved_anyway:
                with self._holding_up(at):
                    self._saver.save_weights(at, phase, self._record.sync())
        return verdict.stop

    def _held_out(self) -> dict[str, float]:
        """The losses by task that were measured last, in nats a token."""
        assert self._last_evaluation is not None
        return {task: loss.loss for task, loss in self._last_evaluation[1].items()}

    def _save(
        self, at: TrainState, *, permanent: bool = False, event: str = "checkpoint", **facts: str
    ) -> None:
        """permanent: at the end of a phase; `at` is then the beginning of the next one."""
        phase = self._config.phases[at.phase - 1 if permanent else at.phase].name
        with self._holding_up(at):
            # The event comes first, so that it lies within the bytes that the checkpoint keeps.
            self._record.event(at.step, event, phase=phase, **facts)
            self._saver.save(at, phase, self._record.sync(), permanent=permanent)

    @contextmanager
    def _holding_up(self, at: TrainState) -> Iterator[None]:
        """While this rank copies its state or waits for a slow disk, it is not taken to hang."""
        started = time.perf_counter()
        with self._guards.watchdog.patient(f"saving after step {at.step:,}"):
            yield
        self._save_seconds += time.perf_counter() - started

    def _agree(self, at: TrainState) -> None:
        """Between two steps: does a save go on to its next part, does the run end, and why?"""
        received = self._guards.signals.received
        ends = self._guards.divergence.is_over(phase_ends=False)
        started = time.perf_counter()
        save_status, signalled, diverged = self._guards.control_group.largest(
            self._saver.status, int(received is not None), int(ends)
        )
        self._saver.advance(save_status)
        self._save_seconds += time.perf_counter() - started
        if diverged:
            self._end_diverged(at, self._config.phases[at.phase].name)
        if signalled:
            self._stop(at, received)

    def _end_diverged(self, at: TrainState, phase: str) -> NoReturn:
        """Save, so that the run can be continued all the same; it begins with this message."""
        if not self._saver.is_saved(at):
            self._save(at)
        with self._holding_up(at):
            self._saver.finish()
        raise self._guards.divergence.end(at.step, phase)

    def _stop(self, at: TrainState, received: str | None) -> None:
        names = self._guards.control_group.gather(received)
        rank, name = next((rank, name) for rank, name in enumerate(names) if name is not None)
        if self._saver.is_saved(at):
            phase = self._config.phases[at.phase].name
            self._record.event(at.step, "stopped", phase=phase, signal=name)
        else:
            self._save(at, event="stopped", signal=name)
        with self._holding_up(at):
            self._saver.finish()
        raise Stopped(
            f"{name} came to rank {rank}: saved after step {at.step:,}; the same command resumes "
            "from there"
        )
