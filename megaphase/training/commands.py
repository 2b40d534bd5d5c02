"""`megaphase train` and `evaluate`; they import what they need, so `--help` stays fast."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaphase.training.evaluated_split import EvaluatedSplit
from megaphase.utils.arguments import (
    MOST,
    Average,
    Overrides,
    Profile,
    ProfileSteps,
    RunFile,
    Source,
    named,
)
from megaphase.utils.errors import InputError
from megaphase.utils.standard_streams import new_console, standard_output_is_a_log

if TYPE_CHECKING:
    from rich.table import Table

    from megaphase.config.run import RunConfig
    from megaphase.training.evaluate import Evaluation

PROFILE_STEPS = 3
_TITLES = {
    EvaluatedSplit.VALIDATION: "Held-out losses",
    EvaluatedSplit.TEST: "Losses of the test split",
    EvaluatedSplit.TRAINING: "Losses of a sample of the training documents",
}


def train_command(
    run_file: RunFile,
    overrides: Overrides = None,
    source: Source = None,
    profile: Profile = False,
    profile_steps: ProfileSteps = None,
) -> None:
    """Train all phases of a run file, or resume where the run stopped.

    One process by itself; several under `megaphase launch local`, torchrun or srun. On SIGTERM,
    SIGUSR1 or Ctrl-C it saves and ends with exit code 75; the same command then resumes, also with
    another number of processes. A second Ctrl-C ends it at once.

    Example: megaphase train run.yaml phases.0.steps=500

    Example: megaphase train joint.yaml --from runs/base@pretrain
    """
    from contextlib import ExitStack

    from megaphase.config.load import load_run_file
    from megaphase.distributed.all_ranks import leaving_processes, run_on_all_ranks
    from megaphase.fault_tolerance.stop_signals import StopSignals

    standard_output_is_a_log()
    # The signals before anything that takes seconds is imported.
    with StopSignals() as signals, leaving_processes(), ExitStack() as resources:
        config = run_on_all_ranks(lambda: load_run_file(run_file, tuple(overrides or ())))

        from megaphase.training.closing import next_commands
        from megaphase.training.startup import watched_processes
        from megaphase.training.trainer import Trainer

        watchdog = resources.enter_context(watched_processes(config, signals))
        with watchdog.patient("setting up"):
            trainer = Trainer(config, new_console(), watchdog, signals, resources, source)
            if trainer.is_done():
                steps = trainer.state.step
                trainer.say(f"{config.output}: all {steps:,} steps are done; nothing to do")
                for line in next_commands(config):
                    trainer.say(line)
                return
            if trainer.has_reached_end_after():
                end = config.checkpoint.end_after
                trainer.say(f"{config.output}: checkpoint.end_after: {end:,} has been reached")
                return
            trainer.build(profile_steps or (PROFILE_STEPS if profile else 0))
        trainer.run()


def evaluate_command(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The run file (YAML), a run directory, or RUN@NAME of one."
        ),
    ],
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A phase (its end), best-TASK, step-…, RUN@NAME or a path; the run's newest if "
            "not given.",
        ),
    ] = None,
    split: Annotated[
        list[EvaluatedSplit] | None,
        typer.Option(
            help="Documents held out for validation (the default), those of the test split, or a "
            "sample of those that are trained on, the same for all seeds; repeatable."
        ),
    ] = None,
    samples: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=MOST,
            help="Samples of each task, once for all splits or once for each; by default "
            "test.samples for test, and validation.samples.",
        ),
    ] = None,
    average: Average = False,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option(callback=named, metavar="FILE", help="Write the figures as JSON.")
    ] = None,
) -> None:
    """Measure the loss of every task at a checkpoint, by default on held-out documents.

    Example: megaphase evaluate run.yaml --checkpoint runs/a/checkpoints/step-00001000

    Example: megaphase evaluate runs/a@joint --split test --samples 800
    """
    from json import dumps

    from megaphase.distributed.all_ranks import leaving_processes, run_on_all_ranks
    from megaphase.distributed.dist_env import global_rank
    from megaphase.fault_tolerance.stop_signals import MEASURING, StopSignals
    from megaphase.utils.files import atomic_write_json, check_place

    with StopSignals(MEASURING) as signals, leaving_processes():
        splits = _samples_of_splits(split or [EvaluatedSplit.VALIDATION], samples)
        config, name = run_on_all_ranks(lambda: _find_run(run, overrides, checkpoint))
        if out is not None:
            run_on_all_ranks(partial(check_place, out))

        from megaphase.training.evaluate import evaluate

        console = new_console(stderr=True)
        found = evaluate(config, name, splits, console, signals, average=average)
    if global_rank() != 0:
        return
    figures = _figures(found) | ({"samples": found.samples} if split else {})
    if out is not None:
        atomic_write_json(out, figures)
    if json:
        print(dumps(figures, indent=2))
        return
    for each in found.losses:
        new_console().print(_losses_table(found, each, average=average))


def _samples_of_splits(
    splits: Sequence[EvaluatedSplit], samples: Sequence[int] | None
) -> dict[EvaluatedSplit, int | None]:
    """Return the number of samples of each split; None: as in the run file."""
    if len(set(splits)) < len(splits):
        raise InputError("--split", "names a split twice", "leave it out once")
    if not samples:
        return dict.fromkeys(splits)
    if len(samples) == 1:
        return dict.fromkeys(splits, samples[0])
    if len(samples) != len(splits):
        raise InputError(
            "--samples",
            f"is given {len(samples)} times for {len(splits)} split{'s' * (len(splits) > 1)}",
            "give it once, or once for each --split",
        )
    return dict(zip(splits, samples, strict=True))


def _find_run(
    run: Path, overrides: Sequence[str] | None, checkpoint: str | None
) -> tuple[RunConfig, str | None]:
    """Return the run file, and the name of the checkpoint, which may be a part of `run`."""
    from megaphase.config.load import load_run

    if "@" not in str(run) or run.exists():
        return load_run(run, tuple(overrides or ())), checkpoint
    folder, _, name = str(run).rpartition("@")
    if not Path(folder).is_dir():
        raise InputError(run, f"there is no run directory {folder}", "give a run file, or RUN@NAME")
    if checkpoint is not None:
        raise InputError("--checkpoint", f"{run} names one, too", "leave out one of them")
    return load_run(Path(folder), tuple(overrides or ())), name


def _figures(found: Evaluation) -> dict[str, Any]:
    """Return what is written as JSON: for every split the losses by task."""
    from dataclasses import asdict

    return {
        "step": found.step,
        **{
            str(split): {task: asdict(loss) for task, loss in losses.items()}
            for split, losses in found.losses.items()
        },
    }


def _losses_table(found: Evaluation, split: EvaluatedSplit, *, average: bool) -> Table:
    from rich.table import Table

    measured = "of the average at step" if average else "at step"
    title = f"{_TITLES[split]} {measured} {found.step:,}"
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    for figure in ("nats a token", "bits a byte", "samples"):
        table.add_column(figure, justify="right")
    for task, loss in found.losses[split].items():
        samples = found.samples[split][task]
        table.add_row(task, f"{loss.loss:.4f}", f"{loss.bits_per_byte:.4f}", f"{samples:,}")
    return table
