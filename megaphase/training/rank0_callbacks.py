"""The callbacks that exist on rank 0 alone: they write and show what becomes of a run."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from megaphase.callbacks.batch_dump import BatchDump
from megaphase.callbacks.callback import Callback
from megaphase.callbacks.display import TrainingDisplay
from megaphase.callbacks.metrics_file import open_metrics
from megaphase.callbacks.tensorboard import TensorBoard
from megaphase.callbacks.trackers.feed import tracker_feed
from megaphase.checkpoint.store import Checkpoint
from megaphase.config.run import RunConfig
from megaphase.plan.branch import Branch
from megaphase.plan.plan import Plan
from megaphase.plan.same_run import settings_of
from megaphase.training.run_directory import RunDirectory
from megaphase.training.startup import say_on_first_rank
from megaphase.training.train_state import TrainState


def first_rank_callbacks(
    config: RunConfig,
    plan: Plan,
    console: Console,
    at: TrainState,
    checkpoint: Checkpoint | None,
    branch: Branch | None,
) -> list[Callback]:
    """In the order in which they are called: the files that an event names are written first.

    Args:
        at: where the run starts or resumes.
        checkpoint: the run's own one, from which it resumes; None at the first start.
        branch: where a run that is a branch began; None for others.

    Raises:
        RunError: one of them cannot be opened.
    """
    directory = RunDirectory(config.output)
    state, resumed_step = (None, None) if checkpoint is None else (checkpoint.state, at.step)
    steps_before = 0 if branch is None else branch.step
    say = say_on_first_rank(console)
    callbacks: list[Callback] = [
        BatchDump(plan, directory.trace),
        open_metrics(directory.metrics, state, steps_before + 1, say),
    ]
    if config.logging.tensorboard:
        tasks = list(config.tasks)
        callbacks.append(TensorBoard(directory.tensorboard, resumed_step, directory.metrics, tasks))
    callbacks += tracker_feeds(config, branch, say)
    display = TrainingDisplay(
        console,
        steps=steps_before + sum(phase.steps for phase in plan.phases),
        phase_steps={phase.name: phase.steps for phase in plan.phases},
        done=at.step,
        every_steps=config.logging.every_steps,
        validation_steps=config.validation.every_steps,
    )
    return [*callbacks, display]


def tracker_feeds(
    config: RunConfig, branch: Branch | None, say: Callable[[str], None]
) -> list[Callback]:
    """The feeds of the run's trackers; it has a metrics.jsonl.

    Raises:
        RunError: a tracker's folder cannot be made.
    """
    metrics = RunDirectory(config.output).metrics
    settings, parent = settings_of(config), None if branch is None else branch.checkpoint
    return [
        tracker_feed(name, tracker, metrics, settings, parent, say)
        for name, tracker in config.logging.trackers()
    ]
