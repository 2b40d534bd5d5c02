"""`megaphase evaluate`: the losses of a checkpoint on held-out documents and other splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from megaphase.checkpoint.names import find_for_run, names_path
from megaphase.checkpoint.store import Checkpoint, CheckpointStore
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import on_first_rank, run_on_all_ranks
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import start_process_grid
from megaphase.fault_tolerance.stop_signals import StopSignals
from megaphase.plan.branch import choose_branch
from megaphase.plan.spec import PlanSpec
from megaphase.plan.stream import Stream
from megaphase.plan.task_corpora import open_streams
from megaphase.training.engine import Engine
from megaphase.training.evaluated_split import EvaluatedSplit
from megaphase.training.evaluator import HeldOutEvaluator, Losses
from megaphase.training.resume import check_checkpoint, load_checkpoint
from megaphase.training.run_directory import RunDirectory
from megaphase.training.startup import (
    check_inputs,
    say_on_first_rank,
    watched_processes,
)
from megaphase.utils.errors import InputError


@dataclass(frozen=True)
class Evaluation:
    """What `megaphase evaluate` found, by split and task.

    Attributes:
        step: of the checkpoint.
        losses: nats a token and bits a byte.
        samples: the number of samples that were scored.
    """

    step: int
    losses: dict[EvaluatedSplit, Losses]
    samples: dict[EvaluatedSplit, dict[str, int]]


def evaluate(
    config: RunConfig,
    checkpoint: str | None,
    splits: Mapping[EvaluatedSplit, int | None],
    console: Console,
    signals: StopSignals,
    *,
    average: bool = False,
) -> Evaluation:
    """Losses of a checkpoint, the run's newest if none is given; on every process.

    Nothing is written to the run directory, which may be another user's.

    Args:
        checkpoint: RUN@NAME, a NAME in this run, or a path.
        splits: the number of samples of each; None: as in the run file, for documents that are
            trained on as many as for validation.
        average: measure the average of the weights that it holds.

    Raises:
        InputError: there is no such checkpoint or split.
    """
    with watched_processes(config, signals) as watchdog:
        with watchdog.patient("setting up"):
            if checkpoint is None or not names_path(checkpoint):
                on_first_rank(lambda: _require_checkpoints(config))
            run_on_all_ranks(lambda: _require_splits(config, splits))
            branch = on_first_rank(lambda: choose_branch(config, None))
            tokenizer, shapes, spec = check_inputs(config, branch, trains=False)
            patience = config.faults.stalled_seconds
            grid = start_process_grid(config.parallel.tensor, patience)
            say = say_on_first_rank(console)
            directory = RunDirectory(config.output)
            store = CheckpointStore(directory.checkpoints, ControlGroup(patience), say)
            on_first_rank(lambda: directory.refuse_other_plan(config, spec.fingerprint, spec.bos))
            found = _find(store, config, checkpoint) if checkpoint else store.newest_whole(say)
            if found is None:
                raise InputError(store.folder, "there is no whole checkpoint", "train first")
            check_checkpoint(found, spec)
            phase = config.phase_number(found.state["phase_name"])
            engine = Engine(config, shapes[phase], grid, len(spec.streams))
            engine.micro = config.phase_batch(phase).micro
            load_checkpoint(engine, found, average=average)
        losses: dict[EvaluatedSplit, Losses] = {}
        counts: dict[EvaluatedSplit, dict[str, int]] = {}
        for split, asked in splits.items():
            streams, samples = _streams(config, spec, split), asked or _samples(config, split)
            evaluator = HeldOutEvaluator(spec, engine, tokenizer, samples, streams)
            losses[split] = evaluator.evaluate(phase, partial(watchdog.at, "measuring"))
            seq_len = spec.phases[phase].kind.seq_len
            counts[split] = {
                task: min(samples, stream.at(seq_len).samples_per_epoch)
                for task, stream in streams.items()
            }
        return Evaluation(found.state["step"], losses, counts)


def _find(store: CheckpointStore, config: RunConfig, name: str) -> Checkpoint:
    return store.open(on_first_rank(lambda: find_for_run(config.output, name)))


def _require_checkpoints(config: RunConfig) -> None:
    folder = RunDirectory(config.output).checkpoints
    if not folder.is_dir():
        raise InputError(folder, "there is no checkpoint yet", "train first")


def _require_splits(config: RunConfig, splits: Iterable[EvaluatedSplit]) -> None:
    if EvaluatedSplit.TEST in splits and not config.tested_tasks():
        raise InputError(
            config.where("test.fraction"),
            "is missing: the run has no test split",
            "add, for example, test: {fraction: 0.05}; it takes documents from training, so for a "
            "new run",
        )


def _streams(config: RunConfig, spec: PlanSpec, split: EvaluatedSplit) -> Mapping[str, Stream]:
    """Return the streams of the tasks that have this split."""
    if split is EvaluatedSplit.TRAINING:
        corpora = {task: stream.corpus for task, stream in spec.streams.items()}
        return open_streams(config, corpora, spec.bos, "training sample")
    return spec.held_out if split is EvaluatedSplit.VALIDATION else spec.test


def _samples(config: RunConfig, split: EvaluatedSplit) -> int:
    return config.test.samples if split is EvaluatedSplit.TEST else config.validation.samples
