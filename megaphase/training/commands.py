"""`megaphase train` and `evaluate`; they import what they need, so `--help` stays fast."""

from __future__ import annotations

from typing import Annotated

import typer

from megaphase.utils.arguments import Average, Overrides, Profile, ProfileSteps, RunFile, Source
from megaphase.utils.standard_streams import new_console, standard_output_is_a_log

PROFILE_STEPS = 3


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

        from megaphase.training.startup import watched_processes
        from megaphase.training.trainer import Trainer

        watchdog = resources.enter_context(watched_processes(config, signals))
        with watchdog.patient("setting up"):
            trainer = Trainer(config, new_console(), watchdog, signals, resources, source)
            if trainer.is_done():
                steps = trainer.state.step
                trainer.say(f"{config.output}: all {steps:,} steps are done; nothing to do")
                return
            trainer.build(profile_steps or (PROFILE_STEPS if profile else 0))
        trainer.run()


def evaluate_command(
    run_file: RunFile,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A phase (its end), best-TASK, step-…, RUN@NAME or a path; the run's newest if "
            "not given.",
        ),
    ] = None,
    average: Average = False,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure the held-out loss of every task at a checkpoint.

    Example: megaphase evaluate run.yaml --checkpoint runs/a/checkpoints/step-00001000
    """
    from dataclasses import asdict
    from json import dumps

    from rich.table import Table

    from megaphase.config.load import load_run_file
    from megaphase.distributed.all_ranks import leaving_processes, run_on_all_ranks
    from megaphase.distributed.dist_env import global_rank
    from megaphase.fault_tolerance.stop_signals import MEASURING, StopSignals

    with StopSignals(MEASURING) as signals, leaving_processes():
        config = run_on_all_ranks(lambda: load_run_file(run_file, tuple(overrides or ())))

        from megaphase.training.evaluate import evaluate

        console = new_console(stderr=True)
        step, losses = evaluate(config, checkpoint, console, signals, average=average)
    if global_rank() != 0:
        return
    if json:
        figures = {task: asdict(loss) for task, loss in losses.items()}
        print(dumps({"step": step, "validation": figures}, indent=2))
        return
    measured = "of the average at step" if average else "at step"
    table = Table(title=f"Held-out losses {measured} {step:,}", title_justify="left")
    table.add_column("task")
    table.add_column("nats a token", justify="right")
    table.add_column("bits a byte", justify="right")
    for task, loss in losses.items():
        table.add_row(task, f"{loss.loss:.4f}", f"{loss.bits_per_byte:.4f}")
    new_console().print(table)
