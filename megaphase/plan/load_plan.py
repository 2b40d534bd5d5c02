"""Open the plan of a run file, for commands that inspect a run without training it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from megaphase.checkpoint.state import check_format
from megaphase.config.load import load_run_file
from megaphase.config.run import RunConfig
from megaphase.corpus.integrity import check_files, compared_bytes
from megaphase.estimate.setup import PhaseSetup, Setup, setup_of
from megaphase.model.presets import phase_shapes
from megaphase.plan.batch_layout import check_batches, check_batches_beforehand
from megaphase.plan.branch import Branch
from megaphase.plan.build import ensure_built
from megaphase.plan.built_folder import SMALL_BYTES, Say
from megaphase.plan.corpus_counts import CorpusCounts
from megaphase.plan.origin import read_origin
from megaphase.plan.plan import Plan
from megaphase.plan.progress import building_progress
from megaphase.plan.same_run import plan_of_run, refuse_other_plan
from megaphase.plan.spec import PhaseSpec, PlanSpec, open_corpora, plan_spec
from megaphase.tokenizer import Tokenizer
from megaphase.utils.standard_streams import new_console


def open_run(run_file: Path, overrides: Sequence[str] | None) -> tuple[RunConfig, Tokenizer]:
    """Load a run file, with overrides, and the tokenizer that it names.

    Raises:
        InputError: the run file is invalid.
    """
    config = load_run_file(run_file, tuple(overrides or ()))
    return config, Tokenizer.load(config.tokenizer)


def phase_setups(config: RunConfig, tokenizer: Tokenizer, processes: int) -> list[PhaseSetup]:
    """Return what determines the memory of every phase of a run on this many GPUs, by its name.

    Raises:
        InputError: its sizes, layout or batch are not divisible as required.
    """
    return setups_for_vocabulary(config, tokenizer.vocab_size, processes)


def setups_for_vocabulary(config: RunConfig, vocab_size: int, processes: int) -> list[PhaseSetup]:
    """Return the same for a tokenizer with so many tokens."""
    check_batches_beforehand(config, processes)
    shapes = phase_shapes(config, vocab_size)
    return [
        PhaseSetup(phase.name, setup_of(config, shape, processes, "cuda", number))
        for number, (phase, shape) in enumerate(zip(config.phases, shapes, strict=True))
    ]


def stage_setups(
    setups: Sequence[PhaseSetup], phases: Sequence[PhaseSpec]
) -> list[tuple[str, list[tuple[Setup, int]]]]:
    """Return what determines the time of the steps of every phase, by its name: the setups of the
    stages of its batch, each with the number of its steps."""
    found = []
    for (name, setup), phase in zip(setups, phases, strict=True):
        stages = phase.batch.within(phase.steps)
        found.append((name, [(setup.with_batch(stage.samples), steps) for stage, steps in stages]))
    return found


def preview_plan(
    config: RunConfig,
    tokenizer: Tokenizer,
    branch: Branch | None = None,
    *,
    whole: bool = False,
    processes: int | None = None,
    to_train: bool = False,
) -> Plan:
    """Open the run's plan; if it is not built yet, build it and show the progress.

    If the output contains a run with another plan, nothing is written there: the index is built in
    a temporary folder, which is removed before the return, and a message says so.

    branch: where the run starts, if it is from another run's checkpoint; by default as recorded in
        its directory.
    whole: whether to verify every byte of a plan that is built.
    processes: which must be able to share the batches that are left to train; None: any number.
    to_train: whether to refuse an output that contains a run with another plan, as training does.

    Raises:
        InputError: the corpora are missing or damaged, the plan cannot be written, the processes
            cannot share a batch, or the branch's checkpoint has another model or other streams.
    """
    origin = read_origin(config.output) if branch is None else branch.origin
    corpora = open_corpora(config)
    known = CorpusCounts.stored(config.output / "plan", lambda: check_files(corpora.values()))
    if whole or compared_bytes(corpora.values()) <= SMALL_BYTES:
        known.verify_once()
    spec = plan_spec(config, tokenizer, origin.positions, corpora=corpora, known=known)
    if processes is not None:
        check_batches(config, spec, processes)
    if branch is not None and branch.state:
        check_format(branch.checkpoint, branch.state)
        [shape, *_] = phase_shapes(config, tokenizer.vocab_size)
        branch.check(config, spec, shape.architecture())
    if to_train:
        refuse_other_plan(config.output, config, spec.fingerprint, spec.bos)
    console = new_console(stderr=True, highlight=False)
    say = partial(console.print, markup=False, soft_wrap=True)
    if plan_of_run(config.output) in (None, spec.fingerprint):
        return build_plan(spec, config.output, console, say, whole=whole)
    say(
        f"{config.output} holds a run with another plan, which is not changed; to train with this "
        "one, choose another output"
    )
    return build_temporary_plan(spec, console, say)


def build_plan(
    spec: PlanSpec, run_dir: Path, console: Console, say: Say, *, whole: bool = False
) -> Plan:
    """Open the plan in a run directory; build it first if there is no valid one.

    console: shows the progress. say: called with sentences for the user. whole: see ensure_built.

    Raises as `ensure_built` does.
    """
    with building_progress(console) as progress:
        plan = Plan(spec, ensure_built(spec, run_dir, say=say, progress=progress, whole=whole))
        for number in range(len(plan.phases)):
            plan.open_phase(number)
    spec.store_tables(run_dir / "plan", say)
    return plan


def build_temporary_plan(spec: PlanSpec, console: Console, say: Say) -> Plan:
    """Build the plan in a temporary folder, which is removed before the return, and open it."""
    with TemporaryDirectory(prefix="megaphase-plan-") as folder:
        # The files are mapped, so the plan can be read after they have been deleted.
        plan = build_plan(spec, Path(folder), console, say)
    spec.store_tables(None)
    return plan
