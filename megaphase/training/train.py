"""`megaphase train` and `megaphase evaluate`: put a run together and set it going."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

from rich.console import Console

from megaphase.callbacks.batch_dump import BatchDump
from megaphase.callbacks.display import TrainingDisplay
from megaphase.callbacks.divergence import DivergenceDetector
from megaphase.callbacks.divergence_monitor import DivergenceWatch, diverged_error
from megaphase.callbacks.early_stopping import EarlyStopping
from megaphase.callbacks.loss_spikes import LossSpikeDetector
from megaphase.callbacks.metrics_file import MetricsLog
from megaphase.callbacks.metrics_recovery import KeptMetrics, kept_metrics
from megaphase.callbacks.profiling.recorder import (
    WARM_UP_STEPS,
    NoProfiler,
    Profiler,
    StepProfiler,
)
from megaphase.callbacks.throughput import device_peak_flops, missing_peak
from megaphase.checkpoint.names import find_for_run
from megaphase.checkpoint.saver import Saver
from megaphase.checkpoint.store import Checkpoint
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import on_first_rank, process_group, run_on_all_ranks
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.fault_tolerance.stop_signals import StopSignals
from megaphase.fault_tolerance.watchdog import Watchdog
from megaphase.plan.run_history import RunHistory
from megaphase.training.backends import Backends
from megaphase.training.branch import choose_branch
from megaphase.training.checkpointer import Checkpointer
from megaphase.training.engine import Engine
from megaphase.training.evaluator import HeldOutLoss
from megaphase.training.loop import Guards, TrainingLoop
from megaphase.training.resume import StartState, load_checkpoint
from megaphase.training.resume_point import ResumePoint
from megaphase.training.run_context import RunContext, build_run_context
from megaphase.training.run_directory import RunDirectory
from megaphase.training.run_logger import RunLogger, ThroughputReference
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import os_errors_named
from megaphase.utils.locks import exclusive_lock
from megaphase.utils.set_aside import make_way_for_file


def train(
    config: RunConfig,
    console: Console,
    signals: StopSignals,
    *,
    source: str | None = None,
    profile_steps: int = 0,
) -> None:
    """Train all phases, or go on from the newest whole checkpoint; called by every process.

    Args:
        signals: entered by the caller, so that those that come while it starts count, too.
        source: RUN@NAME or a checkpoint, from which a new run goes on.
        profile_steps: how many of the first steps to profile; 0 for none.

    Raises:
        InputError: something that the user gave is wrong; on every process.
        RunError: the run cannot go on, or has diverged.
        Stopped: a signal came; the state is saved.
    """
    faults = config.faults
    with (
        process_group(),
        Watchdog(faults.silent_seconds, faults.stalled_seconds) as watchdog,
        contextlib.ExitStack() as stack,
    ):
        signals.ends_with(watchdog.stop)
        with watchdog.patient("setting up"):
            beginning = _beginning(config, source, console, stack)
            setting = beginning.setting
            resume_point = _resume_point(beginning, watchdog)
            detector = _detector(beginning)
            if beginning.is_end():
                steps = beginning.step
                setting.say(f"{config.output}: all {steps:,} steps are done; nothing to do")
                return
            engine = setting.engine()
            setting.say(_describe(setting, engine.parts))
            if reason := missing_peak(config):
                setting.say(reason)
            beginning.load(engine)
            record = stack.enter_context(_record(beginning, console))
            beginning.tell(record)
            history = run_on_all_ranks(beginning.history)
            if history.doubt:
                record.say(history.doubt)
            profiler = _profiler(beginning, profile_steps, watchdog, record, stack)
        guards = _guards(
            beginning, history, watchdog, signals, profiler, detector, record, resume_point
        )
        loop = TrainingLoop(
            config,
            setting.plan,
            engine,
            setting.evaluator(engine),
            _run_saver(beginning, engine, guards, detector, record),
            record,
            guards,
            pad_token_id=setting.parts.tokenizer.eod,
        )
        signals.begin_training(resume_point.loss)
        loop.run(beginning.position(), branched=beginning.branch is not None)


def _beginning(
    config: RunConfig, source: str | None, console: Console, stack: contextlib.ExitStack
) -> StartState:
    """Check everything and take the run directory, which `stack` gives back."""
    branch = run_on_all_ranks(lambda: choose_branch(config, source))
    setting = build_run_context(config, branch, console)
    on_first_rank(lambda: _take(setting.directory, stack))
    checkpoint = setting.store.newest_whole(setting.say)
    if checkpoint is not None:
        run_on_all_ranks(lambda: setting.check_checkpoint(checkpoint))
    return StartState(setting, checkpoint, branch)


def evaluate(
    config: RunConfig, checkpoint: str | None, console: Console, signals: StopSignals
) -> tuple[int, dict[str, HeldOutLoss]]:
    """Held-out losses of a checkpoint, the run's newest if none is given; on every process.

    checkpoint: RUN@NAME, a NAME in this run, or a path.

    Returns the checkpoint's step and the losses by task.
    """
    faults = config.faults
    with (
        process_group(),
        Watchdog(faults.silent_seconds, faults.stalled_seconds) as watchdog,
    ):
        signals.ends_with(watchdog.stop)
        with watchdog.patient("setting up"):
            run_on_all_ranks(lambda: _require_run(config))
            setting = build_run_context(
                config, run_on_all_ranks(lambda: choose_branch(config, None)), console
            )
            found = _checkpoint_to_evaluate(setting, checkpoint)
            run_on_all_ranks(lambda: setting.check_checkpoint(found))
            engine = setting.engine()
            load_checkpoint(setting, engine, found)
        losses = setting.evaluator(engine).evaluate(partial(watchdog.at, "measuring"))
        return found.state["step"], losses


def _checkpoint_to_evaluate(setting: RunContext, name: str | None) -> Checkpoint:
    if name is not None:
        return setting.store.open(
            run_on_all_ranks(lambda: find_for_run(setting.config.output, name))
        )
    newest = setting.store.newest_whole(setting.say)
    if newest is None:
        raise InputError(setting.store.folder, "there is no whole checkpoint", "train first")
    return newest


def _require_run(config: RunConfig) -> None:
    directory = RunDirectory(config.output)
    if not directory.checkpoints.is_dir():
        raise InputError(directory.checkpoints, "there is no checkpoint yet", "train first")


def _take(directory: RunDirectory, stack: contextlib.ExitStack) -> None:
    with os_errors_named(directory.lock):
        stack.enter_context(_sole_run(directory))


def _sole_run(directory: RunDirectory) -> contextlib.AbstractContextManager[None]:
    """Keeps other runs out of the directory, and removes what a killed one left aside."""

    def refuse() -> NoReturn:
        # No wrong input: a job that is started again may find a process of its last start there.
        raise RunError(
            f"{directory.path}: another process is training in this run directory; wait until it "
            "has ended, or choose another output"
        )

    return exclusive_lock(directory.lock, refuse)


def _resume_point(beginning: StartState, watchdog: Watchdog) -> ResumePoint:
    checkpoint = None if beginning.checkpoint is None else beginning.checkpoint.folder.name
    return ResumePoint(checkpoint, beginning.step, partial(setattr, watchdog, "resume_point"))


def _detector(beginning: StartState) -> DivergenceDetector:
    """As it was when the run was saved.

    Raises:
        RunError: the run had diverged, and is not to be trained on.
    """
    config, state = beginning.setting.config, beginning.state
    detector = DivergenceDetector(beginning.setting.parts.shape.vocab)
    if state is None or "divergence" not in state:  # earlier versions have saved none
        return detector
    detector.load_state_dict(state["divergence"])
    between_phases = beginning.position().phase_step == 0
    if config.faults.stop_on_divergence and detector.is_diverged(phase_ends=between_phases):
        source = _checkpoint_until(beginning)
        raise diverged_error(config, detector, beginning.step, state["phase_name"], source)
    return detector


def _checkpoint_until(beginning: StartState) -> Callable[[int], str | None]:
    """The newest checkpoint that is not of a later step, in the run or before it: for --from."""
    setting, branch = beginning.setting, beginning.branch

    def newest(step: int) -> str | None:
        name = setting.store.newest_name(until=step)
        if name is not None:
            return f"{setting.config.output}@{name}"
        return branch.source if branch is not None and branch.step <= step else None

    return newest


def _guards(
    beginning: StartState,
    history: RunHistory,
    watchdog: Watchdog,
    signals: StopSignals,
    profiler: StepProfiler,
    detector: DivergenceDetector,
    record: RunLogger,
    resume_point: ResumePoint,
) -> Guards:
    setting, state = beginning.setting, beginning.state
    monitor = EarlyStopping(setting.config)
    losses = LossSpikeDetector(setting.config.faults.spike_deviations)
    if state is not None:
        monitor.load_state_dict(state["monitor"])
        losses.load_state_dict(state["losses"])
    first = setting.grid.is_first
    trace = BatchDump(setting.directory.traces, setting.plan, writes=first)
    checkpoint = _checkpoint_until(beginning)
    divergence = DivergenceWatch(setting.config, detector, record, checkpoint)
    control_group = setting.control_group
    return Guards(
        control_group,
        watchdog,
        signals,
        monitor,
        losses,
        divergence,
        history,
        trace,
        profiler,
        resume_point,
    )


def _profiler(
    beginning: StartState,
    steps: int,
    watchdog: Watchdog,
    record: RunLogger,
    stack: contextlib.ExitStack,
) -> StepProfiler:
    """For the run's first steps, where that many are left; `stack` ends it."""
    if steps == 0:
        return NoProfiler()
    left, needed = beginning.steps_left, WARM_UP_STEPS + steps
    if left < needed:
        record.say(
            f"Warning: nothing is profiled: {left:,} steps are left, and --profile needs "
            f"{needed:,}, of which {WARM_UP_STEPS} warm up"
        )
        return NoProfiler()
    setting = beginning.setting
    profiler = run_on_all_ranks(
        lambda: Profiler(
            setting.directory.profile,
            steps,
            _throughput_reference(setting),
            setting.control_group,
            watchdog,
            record.say,
        )
    )
    return stack.enter_context(profiler)


def _run_saver(
    beginning: StartState,
    engine: Engine,
    guards: Guards,
    detector: DivergenceDetector,
    record: RunLogger,
) -> Checkpointer:
    setting = beginning.setting
    settings = setting.config.checkpoint
    best = beginning.state["best"] if beginning.state else {}
    setting.control_group.on_first_rank(partial(setting.store.prepare, best))
    saver = Saver(
        setting.store,
        setting.control_group,
        keep=settings.keep,
        asynchronous=settings.asynchronous,
        say=record.say,
        note=guards.resume_point.note_saved,
    )
    return Checkpointer(
        saver,
        engine,
        setting.plan,
        guards.monitor,
        guards.losses,
        detector,
        guards.history,
        setting.facts(),
        best,
    )


@contextlib.contextmanager
def _record(beginning: StartState, console: Console) -> Iterator[RunLogger]:
    """Rank 0's record and display, closed at the end whatever happens."""
    setting, done = beginning.setting, beginning.step
    config, plan = setting.config, setting.plan
    throughput_reference = _throughput_reference(setting)
    if not setting.grid.is_first:
        yield RunLogger(None, None, plan.tasks, throughput_reference)
        return
    path, state = setting.directory.metrics, beginning.state
    with os_errors_named(path):
        kept = KeptMetrics(0)
        if state is not None:
            kept = kept_metrics(path, state, beginning.first_step + 1)
        make_way_for_file(path, "the run's metrics", setting.say)
    metrics = MetricsLog(
        path,
        keep_bytes=kept.bytes,
        tensorboard=setting.directory.tensorboard if config.logging.tensorboard else None,
        resumed_step=None if state is None else done,
    )
    steps = beginning.first_step + sum(phase.steps for phase in plan.phases)
    display = TrainingDisplay(
        console, steps=steps, done=done, every_steps=config.logging.every_steps
    )
    with contextlib.closing(metrics), display:
        record = RunLogger(metrics, display, plan.tasks, throughput_reference)
        if kept.problem is not None:
            record.say(kept.sentence(path))
            record.event(done, "metrics_damaged", **kept.event())
        yield record


def _throughput_reference(setting: RunContext) -> ThroughputReference:
    config = setting.config
    return ThroughputReference(
        config.batch.samples * config.model.seq_len,
        setting.parts.shape.train_flops_per_token(),
        _peak_flops(config, setting.grid),
    )


def _peak_flops(config: RunConfig, grid: ProcessGrid) -> float | None:
    one = device_peak_flops(config)
    return None if one is None else one * grid.world_size


def _describe(setting: RunContext, parts: Backends) -> str:
    config, grid = setting.config, setting.grid
    name = f"{config.model.preset}: " if config.model.preset else ""
    parameters = setting.parts.shape.parameters()
    return (
        f"{name}{parameters / 1e6:,.1f} million parameters, {config.precision}, "
        f"tensor {grid.tensor_size} × data {grid.data_size}, ZeRO {config.parallel.zero}; "
        f"{parts.describe()}"
    )
