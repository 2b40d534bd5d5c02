"""The loop of a training run over phases and steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

from megaphase.callbacks.callback import StepRecord, ValidationRecord
from megaphase.checkpoint.state import best_name, full_name
from megaphase.config.phases import PhaseConfig
from megaphase.optim.schedules import batch_scale, learning_rate
from megaphase.plan.dataset import Batch, StepReader
from megaphase.training.closing import closing_lines
from megaphase.training.evaluator import Losses
from megaphase.training.run_parts import RunParts
from megaphase.utils.errors import InputError, RunError, Stopped

UPLOAD_POLL_SECONDS = 0.1


class Trainer(RunParts):
    """A run from where it starts to its end; every method is called by all ranks."""

    def run(self) -> None:
        """Train from where the run starts to the end of its last phase, or to
        `checkpoint.end_after`.

        Raises:
            RunError: too many steps in a row are not finite, the loss has diverged, copies of a
                parameter are unequal, or a checkpoint cannot be written.
            Stopped: a signal came to some rank; the state is saved.
        """
        began, earlier = time.monotonic(), self.state.step
        while not self.has_nothing_to_do():
            self.engine.micro = self.config.phase_batch(self.state.phase).micro
            if self.state.phase_step == 0:
                self.begin_phase()
            # Until the first step of this start, a signal ends it: there is nothing to save.
            self.signals.begin_training(self.resume_point.loss)
            reason = self.train_phase()
            if reason is not None:
                self.end_phase(reason)
        with self._saving():
            self.checkpointer.finish()
        seconds = time.monotonic() - began
        self.finish_uploads()
        if self.is_done():
            self.say_results(seconds, earlier)

    def say_results(self, seconds: float, earlier: int) -> None:
        """Say how the run has ended, and what can follow.

        seconds: that this start trained. earlier: the step from which it resumed.
        """
        assert self._last_validation is not None
        step, _, losses, average = self._last_validation
        before = 0 if self.branch is None else self.branch.step
        for line in closing_lines(
            self.config,
            step=step,
            steps=step - before,
            earlier=earlier - before,
            seconds=seconds,
            losses=losses,
            average=average,
            bests=self.early_stopping.best(),
        ):
            self.say(line)

    def finish_uploads(self) -> None:
        """Wait until the checkpoints are uploaded, if the run file asks for it, or could not be in
        a last attempt; a signal ends the wait."""
        if self.config.checkpoint.upload is None:
            return
        if self.uploader is not None:
            self.uploader.hurry()
        with self.watchdog.patient("uploading checkpoints"):
            busy, signalled = 1, 0
            while busy and not signalled:
                time.sleep(UPLOAD_POLL_SECONDS)
                is_busy = self.uploader is not None and self.uploader.is_busy
                received = self.signals.received is not None
                busy, signalled = self.control_group.largest(int(is_busy), int(received))

    def begin_phase(self) -> None:
        """Switch to the phase, and validate before its first step."""
        phase, step = self.phase.name, self.state.step
        used = [start.samples for start in self.state.starts]
        starts = dict(zip(self.plan.tasks, used, strict=True))
        self.history.begin_phase(phase, step, starts)
        trained = self.trained_tokens.event(self.state.phase)
        own = self.phase.model
        model = {} if own is None else {"model": own.as_json()}
        self.callbacks.event(step, "phase_start", phase=phase, **trained, **model)
        sentences = self.trained_tokens.sentences(self.state.phase)
        if own is not None:
            sentences.append(f"model with {own}")
        for sentence in sentences:
            self.say(f"{phase} step {step:,}  {sentence}")
        self.engine.take_shape(self.shapes[self.state.phase])
        if self.branch is not None or self.state.phase > 0:
            self.switch_phase()
        with self.watchdog.patient(f"beginning {phase}"):
            new_weights = self.averages.begin_phase(self.state)
            if new_weights:
                self._last_validation = None
        self.engine.spikes.begin_phase()
        self.callbacks.on_phase_begin(self.state.phase, phase)
        self.validate(saved_anyway=False, begins_phase=True, new_weights=new_weights)
        if self.state.phase == 0 and self.benchmarks.are_wanted:
            self.measure_benchmarks()

    def switch_phase(self) -> None:
        """Keep the weights of the phase before; with `reset`, nothing else of it."""
        if self.phase.optimizer_state == "reset":
            phase, step = self.phase.name, self.state.step
            self.engine.state.reset()
            self.callbacks.event(step, "optimizer_reset", phase=phase)
            self.say(f"{phase} step {step:,}  optimizer state reset")

    def train_phase(self) -> str | None:
        """Train the phase from the current position to its end, and return the reason of the end;
        None if the run ends before, after the step `checkpoint.end_after`."""
        self.engine.train_only(self.trained_tokens.of_phases[self.state.phase])
        self.engine.weigh_losses(self.config.relative_loss_weights(self.state.phase))
        self.control_group.on_first_rank(self.build_tables)
        reader = StepReader(
            self.plan,
            self.state.phase,
            rank=self.grid.data_rank,
            ranks=self.grid.data_size,
            pad_token_id=self.tokenizer.eod,
            starts=self.state.starts,
        )
        self.check_opened_files()
        for batch in reader.steps(self.state.phase_step, self.phase_steps):
            self.plan_check.raise_fault()
            self.train_step(batch, reader.wait_seconds)
            reason = self.validate_if_due()
            if reason is not None:
                return reason
            self.save_if_due()
            self.stop_if_due()
            if self.has_reached_end_after():
                phase, step = self.phase.name, self.state.step
                self.say(f"{phase} step {step:,}  saved; the run ends here: checkpoint.end_after")
                return None
            self.watchdog.at(f"reading the batch of step {self.state.step + 1:,}")
        raise AssertionError("the last step of a phase ends it")

    def build_tables(self) -> None:
        """Build the tables of packed documents that are missing: after a phase that ended early."""
        self.plan.open_phase(self.state.phase, self.state.starts)

    def train_step(self, batch: Batch, data_wait_seconds: float) -> None:
        """Train one step, and report it, or on a GPU the one before; see StepRecorder."""
        spec, before = self.plan.spec, self.state
        samples = spec.phases[before.phase].batch.samples_at(before.phase_step)
        tokens = spec.tokens_at(before.phase, before.phase_step)
        self.state = before.after_step(tokens)
        step = self.state.step
        schedule = self.phase.learning_rate
        rate = learning_rate(schedule, before.phase_step, self.phase_steps)
        rate *= batch_scale(schedule, samples, self.config.phase_batch(before.phase).samples)
        progress = partial(self.watchdog.at, f"in step {step:,}")
        progress()
        self.callbacks.on_step_begin(step)
        began = time.perf_counter()
        result = self.engine.train_step(batch, rate, step, progress)
        self.averages.after_step(self.state, result)
        self.replicas.begin(step)
        times = {"began": began, "data_wait": data_wait_seconds, "save": self._save_seconds}
        record = self.recorder.add(
            result, self.state, self.phase.name, rate, samples=samples, tokens=tokens, **times
        )
        self._save_seconds = 0.0
        self.resume_point.note_step(step)
        self._report(record)

    def finish_step(self) -> None:
        """Report the newest step, where that has not been done; end the run if copies of a
        parameter are unequal after it.

        All ranks agree on that before its weights are measured or saved.
        """
        self._report(self.recorder.finish())
        self.replicas.begin_before_use(self.state.step)
        if self.control_group.largest(int(self.replicas.has_found(self.state.step)))[0]:
            self._end_unequal(self.phase.name)

    def _report(self, record: StepRecord | None) -> None:
        """Tell the callbacks of a step; end the run if too many in a row were skipped."""
        if record is None:
            return
        self.callbacks.on_step_end(record)
        if not record.applied:
            self.history.skip(record.step, spike=record.is_spike)
            if self.loss_spikes.has_skipped_too_many():
                with self._saving():
                    self.checkpointer.finish()
                raise self.loss_spikes.stop(record)

    def validate_if_due(self) -> str | None:
        """Measure the held-out losses if that is due; returns why the phase ends here, or None."""
        is_last = self.state.phase_step == self.phase_steps
        reason = "its length is reached" if is_last else None
        if is_last or self.state.step % self.config.validation.every_steps == 0:
            # At the end of a phase a checkpoint follows in any case.
            stop = self.validate(saved_anyway=is_last or self._save_is_due())
            reason = stop or reason
        self.measure_benchmarks_if_due(ends_phase=reason is not None)
        return reason

    def measure_benchmarks_if_due(self, *, ends_phase: bool) -> None:
        """Measure benchmarks if that is due; where they fail, report it and continue to train."""
        step, phase = self.state.step, self.phase.name
        if not self.benchmarks.are_due(step, ends_phase=ends_phase):
            return
        self.finish_step()
        try:
            self.measure_benchmarks()
        except (InputError, RunError) as error:  # the same on all ranks
            self.callbacks.event(step, "benchmarks_failed", phase=phase, reason=str(error))
            self.say(f"{phase} step {step:,}  benchmarks failed: {error}")

    def measure_benchmarks(self) -> None:
        """Run the benchmarks of `validation.harness` on the current weights.

        Raises:
            InputError, RunError: a task fails, or asks for something that is not supported.
        """
        step, phase = self.state.step, self.phase.name
        with self.watchdog.patient(f"measuring benchmarks after step {step:,}"):
            found = self.benchmarks.measure(
                self.engine, self.tokenizer, self.control_group, step, phase
            )
        if found is not None:
            self.callbacks.on_benchmarks_end(found)

    def validate(
        self, *, saved_anyway: bool, begins_phase: bool = False, new_weights: bool = False
    ) -> str | None:
        """Measure the held-out losses, once for both phases that meet at a switch if the model has
        the same sequence length and rotary positions in both.

        saved_anyway: whether a whole checkpoint of this step follows; the best weights are then
            in that one. new_weights: whether the phase begins with others than the one before had.

        Returns why early stopping ends the phase, or None.
        """
        self.finish_step()
        phase, step = self.phase.name, self.state.step
        losses, average = self._held_out_losses()
        outcome = self.early_stopping.observe(
            step, {task: found.loss for task, found in losses.items()}, new_weights=new_weights
        )
        shown = None if begins_phase else average
        repeated = begins_phase and not new_weights and self._has_shape_of_phase_before()
        self.callbacks.on_validation_end(
            ValidationRecord(step, phase, losses, outcome.gaps, begins_phase, shown, repeated)
        )
        # The full checkpoint that then follows has these weights; those with which the next phase
        # begins may need the name of this step's best weights.
        saved_anyway |= outcome.stop is not None and not begins_phase
        if outcome.improved:
            self.callbacks.event(step, "best", phase=phase, of=outcome.improved)
            name = full_name(step) if saved_anyway else best_name(step)
            self.checkpointer.note_best(outcome.improved, name)
            if not saved_anyway:
                with self._saving():
                    self.checkpointer.save_weights(
                        self.state, phase, self.divergence.last_sound_step
                    )
        return outcome.stop

    def _has_shape_of_phase_before(self) -> bool:
        number = self.state.phase
        return number > 0 and self.shapes[number - 1] == self.shapes[number]

    def _held_out_losses(self) -> tuple[Losses, Losses | None]:
        """Those of the current weights, and of their average, if there is one, with the phase's
        sequence length and rotary positions."""
        step, phase = self.state.step, self.state.phase
        shape, last = self.shapes[phase], self._last_validation
        if last is None or last[:2] != (step, shape):
            measuring = partial(self.watchdog.at, f"measuring after step {step:,}")
            losses = self.evaluator.evaluate(phase, measuring)
            last = step, shape, losses, self.averages.losses(phase, measuring)
            self._last_validation = last
        return last[2:]

    def save_if_due(self) -> None:
        if self._save_is_due():
            self.save(self.phase.name)

    def save(
        self, phase: str, *, permanent: bool = False, event: str = "checkpoint", **facts: Any
    ) -> None:
        """Save a whole checkpoint.

        phase: whose steps were trained last. permanent: at the end of a phase.
        """
        self.finish_step()
        with self._saving():
            # The event comes first, so that it lies within the bytes that the checkpoint keeps.
            self.callbacks.event(self.state.step, event, phase=phase, **facts)
            self.checkpointer.save(
                self.state, phase, self.divergence.last_sound_step, permanent=permanent
            )

    def end_phase(self, reason: str) -> None:
        """Save a permanent checkpoint from which the next phase starts."""
        self.finish_step()
        phase, step = self.phase.name, self.state.step
        self.history.end_phase(phase, step, reason)
        self.callbacks.event(step, "phase_end", phase=phase, reason=reason)
        if self.state.phase_step < self.phase_steps:
            self.say(f"{phase} step {step:,}  the phase ends: {reason}")
        self.state = self.state.next_phase(self.state.used(self.plan))
        self.save(phase, permanent=True)
        if self.control_group.largest(int(self.divergence.is_over(phase_ends=True)))[0]:
            self._end_diverged(phase)

    def stop_if_due(self) -> None:
        """Advance a save that is under way; end the run if it has diverged, copies of a
        parameter are unequal, or a signal came.

        All ranks agree on this between two steps.
        """
        received = self.signals.received
        is_over = self.divergence.is_over(phase_ends=False)
        is_unequal = self.replicas.has_found(self.state.step - 1)
        started = time.perf_counter()
        save_status, signalled, diverged, unequal = self.control_group.largest(
            self.checkpointer.status, int(received is not None), int(is_over), int(is_unequal)
        )
        self.checkpointer.advance(save_status)
        self._save_seconds += time.perf_counter() - started
        if unequal:
            self._end_unequal(self.phase.name)
        if diverged:
            self.finish_step()  # which may be the one with which it has recovered
            is_over = self.divergence.is_over(phase_ends=False)
            if self.control_group.largest(int(is_over))[0]:
                self._end_diverged(self.phase.name)
        if signalled:
            self._stop(received)

    @property
    def phase(self) -> PhaseConfig:
        """The phase that the next step is of."""
        return self.config.phases[self.state.phase]

    @property
    def phase_steps(self) -> int:
        """Steps of that phase, if it does not end early."""
        return self.plan.phases[self.state.phase].steps

    def _save_is_due(self) -> bool:
        step, settings = self.state.step, self.config.checkpoint
        return step % settings.every_steps == 0 or step == settings.end_after

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Lets this rank copy its state or wait for a slow disk without being taken for hanging."""
        started = time.perf_counter()
        with self.watchdog.patient(f"saving after step {self.state.step:,}"):
            yield
        self._save_seconds += time.perf_counter() - started

    def _end_diverged(self, phase: str) -> NoReturn:
        """Save, so that the run can be resumed with faults.stop_on_divergence: false; end it."""
        if not self.checkpointer.is_saved(self.state):
            self.save(phase)
        with self._saving():
            self.checkpointer.finish()
        raise self.divergence.stop(self.state.step, phase)

    def _end_unequal(self, phase: str) -> NoReturn:
        """End the run; nothing is saved, since no rank knows which copy is right."""
        with self._saving():
            self.checkpointer.finish()
        raise self.replicas.error(phase)

    def _stop(self, received: str | None) -> NoReturn:
        """Save and end the run; received: the signal that came to this rank."""
        names = self.control_group.gather(received)
        rank, name = next((rank, name) for rank, name in enumerate(names) if name is not None)
        phase, step = self.phase.name, self.state.step
        if self.checkpointer.is_saved(self.state):
            self.callbacks.event(step, "stopped", phase=phase, signal=name)
        else:
            self.save(phase, event="stopped", signal=name)
        with self._saving():
            self.checkpointer.finish()
        raise Stopped(
            f"{name} came to rank {rank}: saved after step {step:,}; the same command resumes "
            "from there"
        )
