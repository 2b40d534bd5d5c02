"""What training and evaluation both begin with: the run file checked, the plan open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megaphase.checkpoint.state import CHECKPOINT_FORMAT, check_format
from megaphase.checkpoint.store import Checkpoint, CheckpointStore
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import on_first_rank, run_on_all_ranks
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.dist_env import share_of_node
from megaphase.distributed.process_grid import ProcessGrid, start, world_size
from megaphase.estimate.available_memory import check_memory
from megaphase.estimate.hardware import planned_card
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.plan.build import ensure_built
from megaphase.plan.plan import Plan
from megaphase.plan.preview import plan_warnings
from megaphase.plan.progress import building_progress
from megaphase.plan.spec import PlanSpec, check_corpora, plan_spec
from megaphase.tokenizer import Tokenizer
from megaphase.training.backends import choose_parts
from megaphase.training.branch import Branch
from megaphase.training.engine import Engine
from megaphase.training.evaluator import HeldOutEvaluator
from megaphase.training.nvme import prepare_offload
from megaphase.training.run_directory import RunDirectory
from megaphase.utils.errors import InputError


@dataclass(frozen=True)
class ValidatedInputs:
    """What the run file stands for, all of it checked, before anything is built."""

    tokenizer: Tokenizer
    shape: GPTShape
    spec: PlanSpec


def check_run(config: RunConfig, branch: Branch | None) -> ValidatedInputs:
    """Check the run file against the world: processes, tokenizer, shape, corpora, and the branch.

    Raises:
        InputError: on the first thing that does not fit.
    """
    config.micro_batches(world_size())
    planned_card(config)
    tokenizer = Tokenizer.load(config.tokenizer)
    shape = build_shape(config, tokenizer.vocab_size)
    check_memory(config, shape)
    spec = plan_spec(config, tokenizer, branch.used if branch else {})
    if branch is not None:
        if branch.state:
            check_format(branch.checkpoint, branch.state)
        branch.check(config, spec, shape.facts())
    choose_parts(config)
    prepare_offload(config)
    return ValidatedInputs(tokenizer, shape, spec)


@dataclass(frozen=True)
class RunContext:
    """The run as this process sees it."""

    config: RunConfig
    parts: ValidatedInputs
    grid: ProcessGrid
    control_group: ControlGroup
    directory: RunDirectory
    plan: Plan
    store: CheckpointStore
    say: Callable[[str], None]

    def engine(self) -> Engine:
        """The model with its initial weights."""
        return Engine(self.config, self.parts.shape, self.grid, len(self.plan.tasks))

    def evaluator(self, engine: Engine) -> HeldOutEvaluator:
        """Measures what the run file asks for."""
        tokenizer = self.parts.tokenizer
        return HeldOutEvaluator(
            self.parts.spec,
            engine,
            samples=self.config.validation.samples,
            token_bytes=tokenizer.token_bytes(),
            pad_token_id=tokenizer.eod,
        )

    def facts(self) -> dict[str, Any]:
        """What every checkpoint says of its run."""
        return {
            "format": CHECKPOINT_FORMAT,
            "plan": self.plan.spec.fingerprint,
            "streams": self.plan.spec.stream_fingerprints,
            "model": self.parts.shape.facts(),
            "processes": self.grid.world_size,
            "tensor": self.grid.tensor_size,
            "zero": self.config.parallel.zero,
            "precision": self.config.precision,
        }

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint of another run file or another version of this program."""
        check_format(checkpoint.folder, checkpoint.state)
        if checkpoint.state["plan"] != self.plan.spec.fingerprint:
            raise InputError(
                checkpoint.folder,
                "was written with another plan than that of this run file",
                "use the run file and the corpora with which it was written",
            )


def build_run_context(config: RunConfig, branch: Branch | None, console: Console) -> RunContext:
    """Check everything, form the groups of processes, and build the plan where there is none.

    Called by all processes.

    Raises:
        InputError: something that the user gave is wrong; on every process.
    """
    # First, so that no process uses a file in which another one has found a fault.
    run_on_all_ranks(lambda: check_corpora(config, *share_of_node()))
    parts = run_on_all_ranks(lambda: check_run(config, branch))
    grid = start(config.parallel.tensor)

    def say(text: str) -> None:
        if grid.is_first:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    control_group = ControlGroup()
    directory = RunDirectory(config.output)
    store = CheckpointStore(directory.checkpoints, control_group, say)
    if branch is not None and branch.is_new:
        store.open(branch.checkpoint)  # before anything is written
    plan = _open_plan(config, parts.spec, directory, branch, say, console)
    return RunContext(config, parts, grid, control_group, directory, plan, store, say)


def _open_plan(
    config: RunConfig,
    spec: PlanSpec,
    directory: RunDirectory,
    branch: Branch | None,
    say: Callable[[str], None],
    console: Console,
) -> Plan:
    """Build the plan where it is not there yet, and claim the run directory for it."""

    def build_and_claim() -> Path:
        directory.refuse_other_run(config)
        with building_progress(console) as progress:
            folder = ensure_built(spec, directory.path, say=say, progress=progress)
        summary = Plan(spec, folder).summary()
        if branch is not None and branch.is_new:
            # First, so that a run that is killed here can never be taken for one of its own.
            branch.record(directory.path)
        directory.claim(config, summary)
        for sentence in plan_warnings(summary):
            say(f"Warning: {sentence}")
        return folder

    return Plan(spec, on_first_rank(build_and_claim))
