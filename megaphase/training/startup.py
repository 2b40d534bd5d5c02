"""The first steps of training and evaluation: processes joined, inputs checked, the plan opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from megaphase.callbacks.throughput import missing_peak
from megaphase.checkpoint.state import check_format
from megaphase.config.run import RunConfig
from megaphase.corpus import Corpus
from megaphase.distributed.all_ranks import on_first_rank, process_group, run_on_all_ranks
from megaphase.distributed.dist_env import global_rank, world_size
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.estimate.available_memory import check_memory
from megaphase.estimate.hardware import planned_card
from megaphase.fault_tolerance.stop_signals import StopSignals
from megaphase.fault_tolerance.watchdog import Watchdog
from megaphase.model.parameters import parameter_count
from megaphase.model.presets import phase_shapes
from megaphase.model.shape import GPTShape
from megaphase.plan.batch_layout import check_batches, check_batches_beforehand
from megaphase.plan.branch import Branch
from megaphase.plan.build import plan_folder, remove_other_indices
from megaphase.plan.corpus_counts import CorpusCounts
from megaphase.plan.held_out_noise import held_out_warnings
from megaphase.plan.load_plan import build_plan
from megaphase.plan.plan import Headers, Plan
from megaphase.plan.preview import plan_warnings
from megaphase.plan.same_run import plan_of_run
from megaphase.plan.spec import PlanSpec, plan_spec
from megaphase.tokenizer import Tokenizer
from megaphase.tokenizer.deferred_backend import TokenizerFacts
from megaphase.training.backends import Backends, choose_backends, precision_warning
from megaphase.training.determinism import check_environment, set_environment
from megaphase.training.new_tokens import TrainedTokens
from megaphase.training.nvme import prepare_offload
from megaphase.training.run_directory import RunDirectory
from megaphase.training.shared_corpora import open_verified_corpora
from megaphase.training.tracker_check import check_trackers


@contextmanager
def watched_processes(config: RunConfig, signals: StopSignals) -> Iterator[Watchdog]:
    """Join the process group under a watchdog, which a stop signal ends while the run starts."""
    set_environment(config)
    faults = config.faults
    with (
        process_group(),
        Watchdog(faults.silent_seconds, faults.stalled_seconds) as watchdog,
    ):
        signals.ends_with(watchdog.stop)
        yield watchdog


def say_on_first_rank(console: Console) -> Callable[[str], None]:
    """Prints a sentence on rank 0, and nothing on the others."""

    def say(text: str) -> None:
        if global_rank() == 0:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    return say


class Inputs(NamedTuple):
    """What a run file means; shapes: of the model in every phase."""

    tokenizer: Tokenizer
    shapes: list[GPTShape]
    spec: PlanSpec


def check_inputs(config: RunConfig, branch: Branch | None, *, trains: bool = True) -> Inputs:
    """Check the run file against processes, tokenizer, shape, corpora and the branch's checkpoint.

    Called by all ranks, before anything is built.
    trains: whether the processes must be able to share the training batches.

    Raises:
        InputError: on the first thing that does not fit; on every rank.
    """
    corpora = open_verified_corpora(config)
    found: list[Inputs] = []

    def check_on_first_rank() -> _Facts:
        plans = config.output / "plan"
        known = CorpusCounts.stored(plans)
        found.append(_check_inputs(config, branch, corpora, known, trains=trains))
        return _Facts(found[0].tokenizer.facts(), known.known)

    facts = on_first_rank(check_on_first_rank)

    def check_this_process() -> Inputs:
        if not found:
            tokenizer, known = Tokenizer.of_facts(facts.tokenizer), CorpusCounts(facts.counts)
            shapes = phase_shapes(config, tokenizer.vocab_size)
            spec = _spec(config, tokenizer, branch, corpora, known, checked=True)
            found.append(Inputs(tokenizer, shapes, spec))
        check_memory(config, found[0].shapes[0])
        choose_backends(config)
        check_environment(config)
        check_trackers(config)
        prepare_offload(config)
        return found[0]

    return run_on_all_ranks(check_this_process)


class _Facts(NamedTuple):
    """What rank 0 has read for all ranks; counts: see CorpusCounts."""

    tokenizer: TokenizerFacts
    counts: dict[str, list[float]]


def _check_inputs(
    config: RunConfig,
    branch: Branch | None,
    corpora: Mapping[Path, Corpus],
    known: CorpusCounts,
    *,
    trains: bool,
) -> Inputs:
    # First, so that a key that was changed since the run began is named as that.
    RunDirectory(config.output).refuse_other_run(config)
    config.data_ranks(world_size())
    if trains:
        check_batches_beforehand(config, world_size())
    planned_card(config)
    tokenizer = Tokenizer.load(config.tokenizer)
    shapes = phase_shapes(config, tokenizer.vocab_size)
    spec = _spec(config, tokenizer, branch, corpora, known, checked=False)
    if trains:
        check_batches(config, spec, world_size())
    if branch is not None:
        if branch.state:
            check_format(branch.checkpoint, branch.state)
        branch.check(config, spec, shapes[0].architecture())
    TrainedTokens.of(config, tokenizer.vocab_size, branch)
    return Inputs(tokenizer, shapes, spec)


def _spec(
    config: RunConfig,
    tokenizer: Tokenizer,
    branch: Branch | None,
    corpora: Mapping[Path, Corpus],
    known: CorpusCounts,
    *,
    checked: bool,
) -> PlanSpec:
    used = branch.origin.positions if branch else {}
    return plan_spec(config, tokenizer, used, corpora=corpora, known=known, checked=checked)


def open_plan(
    config: RunConfig,
    spec: PlanSpec,
    branch: Branch | None,
    say: Callable[[str], None],
    console: Console,
) -> Plan:
    """Build the plan where it is not there yet; called by all ranks.

    Raises:
        InputError: it cannot be written; on every rank.
    """
    directory = RunDirectory(config.output)
    own: list[Plan] = []

    def build() -> tuple[Path, Headers]:
        # `megaphase plan`, or an earlier start, has said how noisy the losses are.
        is_new = not plan_folder(directory.path, spec).exists()
        plan = build_plan(spec, directory.path, console, say)
        summary = plan.summary()
        if branch is not None and branch.is_new:
            # Before the directory is claimed, so that a run that is killed here can never be taken
            # for one of its own.
            branch.record(directory.path)
        noise = held_out_warnings(config, spec) if is_new else []
        for sentence in [*plan_warnings(summary), *noise]:
            say(f"Warning: {sentence}")
        plan.store_counts()
        own.append(plan)
        return plan.folder, plan.headers()

    folder, headers = on_first_rank(build)
    return own[0] if own else Plan(spec, folder, headers)


def claim_directory(
    config: RunConfig, plan: Plan, say: Callable[[str], None], *, trains: bool
) -> None:
    """Write down the run file and the plan; where the run begins, remove indices of other plans.

    trains: whether steps are left to train; otherwise nothing is written down.

    Raises:
        InputError: as RunDirectory.claim.
    """
    directory = RunDirectory(config.output)
    begins = plan_of_run(directory.path) is None
    directory.claim(config, plan.summary(), record=trains)
    if begins:
        remove_other_indices(plan.folder, say)


def run_description(
    config: RunConfig, shape: GPTShape, grid: ProcessGrid, backends: Backends
) -> list[str]:
    """The lines that a run prints about its model, its layout, and why it has no MFU."""
    name = f"{config.model.preset}: " if config.model.preset else ""
    description = (
        f"{name}{parameter_count(shape) / 1e6:,.1f} million parameters, {config.precision}, "
        f"tensor {grid.tensor_size} × data {grid.data_size}, ZeRO {config.parallel.zero}"
    )
    words = [*backends.describe(), *(["deterministic"] if config.deterministic else [])]
    description += f"; {', '.join(words)}" if words else ""
    lines = [description, missing_peak(config), precision_warning(config.precision)]
    return [line for line in lines if line is not None]
