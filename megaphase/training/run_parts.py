"""The objects that a training run is made of."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from rich.console import Console

from megaphase.callbacks.callback import Callback, CallbackList
from megaphase.callbacks.divergence_monitor import DivergenceMonitor
from megaphase.callbacks.early_stopping import EarlyStopping
from megaphase.callbacks.loss_spikes import LossSpikeDetector
from megaphase.callbacks.profiling.profiler import Profiler, enough_steps
from megaphase.callbacks.throughput import throughput_reference
from megaphase.checkpoint.saver import Saver
from megaphase.checkpoint.store import CheckpointStore
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import on_first_rank, run_on_all_ranks
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import device, start_process_grid
from megaphase.fault_tolerance.stop_signals import StopSignals
from megaphase.fault_tolerance.watchdog import Watchdog
from megaphase.model.shape import GPTShape
from megaphase.plan.background_check import BackgroundCheck
from megaphase.plan.batch_layout import check_remaining_batches
from megaphase.plan.branch import choose_branch
from megaphase.plan.preview import bos_sentences
from megaphase.training.checkpointer import Checkpointer, checkpoint_facts
from megaphase.training.engine import Engine
from megaphase.training.evaluator import HeldOutEvaluator, Losses
from megaphase.training.new_tokens import TrainedTokens
from megaphase.training.phase_averages import PhaseAverages, load_average
from megaphase.training.rank0_callbacks import first_rank_callbacks, tracker_feeds
from megaphase.training.replica_check import ReplicaCheck
from megaphase.training.resume import (
    load_checkpoint,
    newest_checkpoint,
    newest_name_until,
    refuse_diverged,
    report_start,
    starting_history,
    starting_state,
    starting_weights,
)
from megaphase.training.resume_point import ResumePoint
from megaphase.training.run_benchmarks import RunBenchmarks
from megaphase.training.run_directory import RunDirectory
from megaphase.training.startup import (
    check_inputs,
    claim_directory,
    open_plan,
    run_description,
    say_on_first_rank,
)
from megaphase.training.step_recorder import StepRecorder
from megaphase.training.uploads import claimed_uploader


class RunParts:
    """The objects of a run, which is trained by Trainer; every method is called by all ranks.

    Attributes:
        shapes: of the model in every phase.
        state: where the run is: between which two steps of which phase.
    """

    def __init__(
        self,
        config: RunConfig,
        console: Console,
        watchdog: Watchdog,
        signals: StopSignals,
        resources: contextlib.ExitStack,
        source: str | None,
    ) -> None:
        """Check the inputs, build the plan, and find out where the run starts.

        Args:
            resources: closes at the end of the run what is opened here.
            source: RUN@NAME or a checkpoint, from which a new run starts; None for others.
        """
        self.config, self.console = config, console
        self.watchdog, self.signals, self._resources = watchdog, signals, resources
        self.say = say_on_first_rank(console)

        self.branch = branch = on_first_rank(lambda: choose_branch(config, source))
        self.tokenizer, self.shapes, spec = check_inputs(config, branch)
        self.trained_tokens = on_first_rank(
            lambda: TrainedTokens.of(config, self.tokenizer.vocab_size, branch)
        )
        self.benchmarks = RunBenchmarks(config)
        self.grid = start_process_grid(config.parallel.tensor, config.faults.stalled_seconds)
        self.control_group = ControlGroup(config.faults.stalled_seconds)
        self.directory = RunDirectory(config.output)
        self.store = CheckpointStore(self.directory.checkpoints, self.control_group, self.say)
        if branch is not None and branch.is_new:
            self.store.open(branch.checkpoint)  # verified before anything is written
        on_first_rank(
            lambda: self.directory.refuse_other_plan(config, spec.fingerprint, spec.bos)
        )  # before the folder in the store is claimed for another plan
        # Before anything is written, so that a process that is refused changes nothing.
        where = config.where("output")
        on_first_rank(lambda: resources.enter_context(self.directory.sole_run(where)))
        self.uploader = claimed_uploader(config, spec, self.say)
        self.plan = open_plan(config, spec, branch, self.say, console)
        self.plan_check = resources.enter_context(BackgroundCheck([]))
        self.check_opened_files()
        if self.uploader is not None:
            self.uploader.start()
            resources.callback(self.uploader.close)

        self.checkpoint = newest_checkpoint(self.store, self.plan, self.say)
        self.state = starting_state(self.plan, self.checkpoint, branch)
        run_on_all_ranks(self._check_batches)
        self.resume_point = ResumePoint(
            None if self.checkpoint is None else self.checkpoint.folder.name,
            self.state.step,
            partial(setattr, watchdog, "resume_point"),
        )
        until = partial(newest_name_until, config, self.store, branch)
        self.divergence = DivergenceMonitor(config, self.shapes[0].vocab, until)
        if self.checkpoint is not None:
            refuse_diverged(self.divergence, self.checkpoint)
        trains = not self.has_nothing_to_do()
        on_first_rank(lambda: claim_directory(config, self.plan, self.say, trains=trains))

    def is_done(self) -> bool:
        """Whether all phases are done."""
        return self.state.phase == len(self.config.phases)

    def has_reached_end_after(self) -> bool:
        """Whether the step after which `checkpoint.end_after` ends the run has been trained."""
        end = self.config.checkpoint.end_after
        return end is not None and self.state.step >= end

    def has_nothing_to_do(self) -> bool:
        """Whether all steps have been trained that this start of the run is to train."""
        return self.is_done() or self.has_reached_end_after()

    def check_opened_files(self) -> None:
        """Have rank 0 verify in the background what the plan has opened by now; after a phase that
        ended early, the next one opens tables of packed documents that were not planned."""
        if self.grid.is_first:
            self.plan_check.add(self.plan.files)

    def _check_batches(self) -> None:
        """Check the batches that are left, where the newest whole checkpoint is not the newest."""
        phases, at = self.plan.spec.phases, self.state
        check_remaining_batches(self.config, phases, self.grid.world_size, at.phase, at.phase_step)

    def build(self, profile_steps: int) -> None:
        """Build the model with the run's initial weights, and the objects that need it."""
        config, shape = self.config, self.shapes[self.state.phase]
        self.engine = Engine(config, shape, self.grid, len(self.plan.tasks))
        for sentence in [
            *run_description(config, shape, self.grid, self.engine.backends),
            *bos_sentences(self.plan.spec.bos, self.tokenizer),
        ]:
            self.say(sentence)
        weights = starting_weights(self.store, self.checkpoint, self.branch)
        if weights is not None:
            load_checkpoint(self.engine, weights)
            is_own = self.checkpoint is not None
            load_average(self.engine, config, self.state, weights, is_own=is_own)
        if self.checkpoint is not None:
            self.engine.spikes.load(self.checkpoint.state)
        self.replicas = ReplicaCheck(config, self.engine.module, self.grid, self.control_group)
        self.evaluator = HeldOutEvaluator(
            self.plan.spec, self.engine, self.tokenizer, config.validation.samples
        )
        self.history = starting_history(config, self.checkpoint, self.branch)
        self.throughput = throughput_reference(config, self.shapes, self.grid.world_size)

        # A profile's steps must not overlap.
        one_later = device().type == "cuda" and profile_steps == 0
        self.recorder = StepRecorder(self.plan.tasks, self.throughput, one_later=one_later)

        self.early_stopping = EarlyStopping(
            config.monitor, config.monitored_tasks(), config.stop_conditions()
        )
        self.loss_spikes = LossSpikeDetector(config.faults, self.directory.trace)
        # In the order in which they are called: events that the last ones report follow the row of
        # their step.
        self.callbacks = CallbackList(self.say)
        self.callbacks.extend(self._profilers(profile_steps))
        if self.grid.is_first:
            self.callbacks.extend(
                first_rank_callbacks(
                    config, self.plan, self.console, self.state, self.checkpoint, self.branch
                )
            )
        self.callbacks.extend([self.early_stopping, self.divergence, self.loss_spikes])
        best = {}
        if self.checkpoint is not None:
            self.callbacks.load_state_dict(self.checkpoint.state)
            best = self.checkpoint.state["best"]

        self.control_group.on_first_rank(partial(self.store.prepare, best))
        saver = Saver(
            self.store,
            self.control_group,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            say=self.say,
            note=self.resume_point.note_saved,
            uploader=self.uploader,
        )
        facts = checkpoint_facts(
            config, self.plan, self.tokenizer.fingerprint, self.grid.world_size
        )
        self.checkpointer = Checkpointer(
            saver,
            self.engine,
            self.plan,
            self.callbacks,
            self.history,
            facts | self.trained_tokens.state(),
            {phase.name: shape for phase, shape in zip(config.phases, self.shapes, strict=True)},
            best,
        )
        self.averages = PhaseAverages(
            config, self.engine, self.evaluator, self.callbacks, self.checkpointer
        )
        # Step and model, the losses of the weights, and those of their average, if there is one.
        self._last_validation: tuple[int, GPTShape, Losses, Losses | None] | None = None
        self._save_seconds = 0.0

        self._open(self.callbacks)
        report_start(self.callbacks, self.checkpoint, self.branch, self.state.step)
        if self.history.doubt:
            self.say(self.history.doubt)

    def finish_trackers(self) -> None:
        """Give the trackers of a run that has nothing left to train what they did not take before
        it ended, or all of it where one was added later."""
        callbacks = CallbackList(self.say)
        if self.grid.is_first and self.directory.metrics.is_file():
            callbacks.extend(tracker_feeds(self.config, self.branch, self.say))
        self._open(callbacks)

    def _open(self, callbacks: CallbackList) -> None:
        """Begin the callbacks, and close them at the end of the run."""
        callbacks.__enter__()

        def close(*error: Any) -> None:
            # A tracker may take longer than a run may stand still.
            with self.watchdog.patient("closing the logs"):
                callbacks.__exit__(*error)

        self._resources.push(close)

    def _profilers(self, steps: int) -> list[Callback]:
        """The profiler of the first steps, if that many are left."""
        if steps == 0 or not enough_steps(steps, self.state.steps_left(self.plan), self.say):
            return []
        guards = self.control_group, self.watchdog, self.say
        folder, throughput = self.directory.profile, self.throughput
        return [run_on_all_ranks(lambda: Profiler(folder, steps, throughput, *guards))]
