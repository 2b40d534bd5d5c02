"""`megaphase evaluate`: the held-out losses of a checkpoint."""

from __future__ import annotations

from functools import partial

from rich.console import Console

from megaphase.callbacks.callback import HeldOutLoss
from megaphase.checkpoint.names import find_for_run
from megaphase.checkpoint.store import Checkpoint, CheckpointStore
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import run_on_all_ranks
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import start_process_grid
from megaphase.fault_tolerance.stop_signals import StopSignals
from megaphase.training.branch import choose_branch
from megaphase.training.engine import Engine
from megaphase.training.evaluator import HeldOutEvaluator
from megaphase.training.resume import check_checkpoint, load_checkpoint
from megaphase.training.run_directory import RunDirectory
from megaphase.training.startup import (
    check_inputs,
    open_plan,
    say_on_first_rank,
    watched_processes,
)
from megaphase.utils.errors import InputError


def evaluate(
    config: RunConfig,
    checkpoint: str | None,
    console: Console,
    signals: StopSignals,
    *,
    average: bool = False,
) -> tuple[int, dict[str, HeldOutLoss]]:
    """Held-out losses of a checkpoint, the run's newest if none is given; on every process.

    Args:
        checkpoint: RUN@NAME, a NAME in this run, or a path.
        average: measure the average of the weights that it holds.

    Returns the checkpoint's step and the losses by task.
    """
    with watched_processes(config, signals) as watchdog:
        with watchdog.patient("setting up"):
            run_on_all_ranks(lambda: _require_checkpoints(config))
            branch = run_on_all_ranks(lambda: choose_branch(config, None))
            tokenizer, shapes, spec = check_inputs(config, branch)
            grid = start_process_grid(config.parallel.tensor)
            say = say_on_first_rank(console)
            folder = RunDirectory(config.output).checkpoints
            store = CheckpointStore(folder, ControlGroup(), say)
            plan = open_plan(config, spec, branch, say, console)
            found = _find(store, config, checkpoint) if checkpoint else store.newest_whole(say)
            if found is None:
                raise InputError(folder, "there is no whole checkpoint", "train first")
            check_checkpoint(found, plan)
            phase = config.phase_number(found.state["phase_name"])
            engine = Engine(config, shapes[phase], grid, len(plan.tasks))
            load_checkpoint(engine, found, average=average)
            evaluator = HeldOutEvaluator(spec, engine, tokenizer, config.validation.samples)
        losses = evaluator.evaluate(phase, partial(watchdog.at, "measuring"))
        return found.state["step"], losses


def _find(store: CheckpointStore, config: RunConfig, name: str) -> Checkpoint:
    return store.open(run_on_all_ranks(lambda: find_for_run(config.output, name)))


def _require_checkpoints(config: RunConfig) -> None:
    folder = RunDirectory(config.output).checkpoints
    if not folder.is_dir():
        raise InputError(folder, "there is no checkpoint yet", "train first")
