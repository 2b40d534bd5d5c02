"""`megaphase train` and `megaphase evaluate`: put a run together and set it going."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megaphase.checkpoint.store import Checkpoint, CheckpointStore
from megaphase.config import RunConfig
from megaphase.errors import InputError
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.parallel.together import on_first_rank, together
from megaphase.parallel.topology import (
    Topology,
    check_world_size,
    process_group,
    start,
    world_size,
)
from megaphase.plan.build import ensure_built
from megaphase.plan.plan import Plan
from megaphase.plan.preview import plan_warnings
from megaphase.plan.progress import building_progress
from megaphase.plan.spec import PlanSpec, plan_spec
from megaphase.tokenizer import Tokenizer
from megaphase.training.deepspeed_config import compute_dtype
from megaphase.training.engine import Engine, check_batch
from megaphase.training.evaluation import HeldOutEvaluator, HeldOutLoss
from megaphase.training.hardware import peak_flops
from megaphase.training.loop import Observer, Position, TrainingLoop
from megaphase.training.metrics import MetricsLog
from megaphase.training.progress import Display
from megaphase.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Ingredients:
    """What the run file stands for, all of it checked, before anything is built."""

    tokenizer: Tokenizer
    shape: GPTShape
    spec: PlanSpec


def check_run(config: RunConfig) -> Ingredients:
    """Check the run file against the world: processes, tokenizer, shape, corpora.

    Raises:
        InputError: on the first thing that does not fit.
    """
    tensor = config.parallel.tensor
    check_world_size(world_size(), tensor, config.where("parallel.tensor"))
    check_batch(config, world_size() // tensor)
    tokenizer = Tokenizer.load(config.tokenizer)
    shape = build_shape(config, tokenizer.vocab_size)
    return Ingredients(tokenizer, shape, plan_spec(config, tokenizer))


@dataclass(frozen=True)
class _Scene:
    """What training and evaluation both begin with, on this process."""

    parts: Ingredients
    topology: Topology
    directory: RunDirectory
    plan: Plan
    store: CheckpointStore
    say: Callable[[str], None]


def train(config: RunConfig, console: Console) -> None:
    """Train all phases, or go on from the newest whole checkpoint; called by every process.

    Raises:
        InputError: something that the user gave is wrong; on every process.
        RunError: the run cannot go on.
    """
    with process_group():
        scene = _set_up(config, console)
        checkpoint = scene.store.newest_whole(scene.say)
        if checkpoint is not None:
            together(lambda: _check_layout(config, checkpoint, scene))
        steps = sum(phase.steps for phase in scene.plan.phases)
        if checkpoint is not None and checkpoint.state["step"] == steps:
            scene.say(f"{scene.directory.path}: all {steps:,} steps are done; nothing to do")
            return
        engine = Engine(config, scene.parts.shape, scene.topology, len(scene.plan.tasks))
        scene.say(_describe(config, scene))
        with _observed(config, scene, checkpoint, steps, console) as observer:
            loop = TrainingLoop(
                config,
                scene.plan,
                engine,
                _evaluator(config, scene, engine),
                scene.store,
                observer,
                filler=scene.parts.tokenizer.eod,
                flops_per_token=scene.parts.shape.train_flops_per_token(),
                peak_flops=_peak_flops(config, scene.topology),
                checkpoint_facts=_layout_facts(config, scene),
            )
            loop.run(_resume(engine, checkpoint, observer))


def evaluate(
    config: RunConfig, checkpoint_dir: Path | None, console: Console
) -> tuple[int, dict[str, HeldOutLoss]]:
    """Held-out losses of a checkpoint, the run's newest if none is given; on every process.

    Returns the checkpoint's step and the losses by task.
    """
    with process_group():
        together(lambda: _require_run(config))
        scene = _set_up(config, console)
        if checkpoint_dir is None:
            checkpoint = scene.store.newest_whole(scene.say)
        else:
            checkpoint = scene.store.open(checkpoint_dir)
        if checkpoint is None:
            raise InputError(scene.store.folder, "there is no whole checkpoint", "train first")
        together(lambda: _check_layout(config, checkpoint, scene))
        engine = Engine(config, scene.parts.shape, scene.topology, len(scene.plan.tasks))
        engine.load(checkpoint.folder)
        return checkpoint.state["step"], _evaluator(config, scene, engine).evaluate()


def _require_run(config: RunConfig) -> None:
    directory = RunDirectory(config.output)
    if not directory.checkpoints.is_dir():
        raise InputError(directory.checkpoints, "there is no checkpoint yet", "train first")


def _set_up(config: RunConfig, console: Console) -> _Scene:
    parts = together(lambda: check_run(config))
    topology = start(config.parallel.tensor)

    def say(text: str) -> None:
        if topology.is_first:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    directory = RunDirectory(config.output)
    plan = _open_plan(config, parts.spec, directory, say, console)
    store = CheckpointStore(directory.checkpoints, topology)
    return _Scene(parts, topology, directory, plan, store, say)


def _open_plan(
    config: RunConfig,
    spec: PlanSpec,
    directory: RunDirectory,
    say: Callable[[str], None],
    console: Console,
) -> Plan:
    """Build the plan where it is not there yet, and claim the run directory for it."""

    def build_and_claim() -> Path:
        directory.refuse_other_run(config)
        with building_progress(console) as progress:
            folder = ensure_built(spec, directory.path, say=say, progress=progress)
        summary = Plan(spec, folder).summary()
        directory.claim(config, summary)
        for sentence in plan_warnings(summary):
            say(f"Warning: {sentence}")
        return folder

    return Plan(spec, on_first_rank(build_and_claim))


def _evaluator(config: RunConfig, scene: _Scene, engine: Engine) -> HeldOutEvaluator:
    tokenizer = scene.parts.tokenizer
    return HeldOutEvaluator(
        scene.parts.spec,
        engine,
        samples=config.validation.samples,
        token_bytes=tokenizer.token_bytes(),
        filler=tokenizer.eod,
    )


@contextlib.contextmanager
def _observed(
    config: RunConfig,
    scene: _Scene,
    checkpoint: Checkpoint | None,
    steps: int,
    console: Console,
) -> Iterator[Observer | None]:
    """Rank 0's record and display, closed at the end whatever happens."""
    if not scene.topology.is_first:
        yield None
        return
    state = checkpoint.state if checkpoint else {"step": 0, "metrics_bytes": 0}
    metrics = MetricsLog(
        scene.directory.metrics,
        keep_bytes=state["metrics_bytes"],
        tensorboard=scene.directory.tensorboard if config.logging.tensorboard else None,
        step=state["step"],
    )
    display = Display(
        console, steps=steps, done=state["step"], every_steps=config.logging.every_steps
    )
    with contextlib.closing(metrics), display:
        yield Observer(metrics, display)


def _resume(engine: Engine, checkpoint: Checkpoint | None, observer: Observer | None) -> Position:
    if checkpoint is None:
        return Position()
    engine.load(checkpoint.folder)
    state = checkpoint.state
    if observer is not None:
        name = checkpoint.folder.name
        observer.metrics.write({"step": state["step"], "event": "resume", "checkpoint": name})
        observer.display.say(f"going on from {checkpoint.folder}")
    return Position(state["phase"], state["phase_step"], state["step"])


def _layout_facts(config: RunConfig, scene: _Scene) -> dict[str, Any]:
    return {
        "format": 1,
        "plan": scene.plan.spec.fingerprint,
        "processes": scene.topology.world_size,
        "tensor": scene.topology.tensor_size,
        "zero": config.parallel.zero,
        "precision": config.precision,
    }


def _check_layout(config: RunConfig, checkpoint: Checkpoint, scene: _Scene) -> None:
    """Refuse a checkpoint of another plan or layout."""
    for key, value in _layout_facts(config, scene).items():
        found = checkpoint.state.get(key)
        if found != value:
            raise InputError(
                checkpoint.folder,
                f"was written with {key} {found}, this run has {value}",
                "start it with the same layout and run file",
            )


def _peak_flops(config: RunConfig, topology: Topology) -> float | None:
    one = peak_flops(compute_dtype(config))
    return None if one is None else one * topology.world_size


def _describe(config: RunConfig, scene: _Scene) -> str:
    name = f"{config.model.preset}: " if config.model.preset else ""
    parameters, topology = scene.parts.shape.parameters(), scene.topology
    return (
        f"{name}{parameters / 1e6:,.1f} million parameters, {config.precision}, "
        f"tensor {topology.tensor_size} × data {topology.data_size}, ZeRO {config.parallel.zero}"
    )
