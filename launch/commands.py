"""`megaphase launch ...` and `megaphase demo`: parse, call."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from megaphase.utils.arguments import (
    MOST,
    MOST_PROCESSES,
    Overrides,
    Profile,
    ProfileSteps,
    RunFile,
    Source,
    finite,
    named,
    train_options,
)
from megaphase.utils.standard_streams import new_console, standard_output_is_a_log

launch_app = typer.Typer(
    help="Start a run as several processes, here or on a SLURM cluster.", no_args_is_help=True
)


@launch_app.command("local")
def local_command(
    run_file: RunFile,
    overrides: Overrides = None,
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            "--gpus",
            "-n",
            min=1,
            max=MOST_PROCESSES,
            help="One a GPU, or a few on the CPU.",
        ),
    ] = 1,
    command: Annotated[Literal["train", "evaluate"], typer.Option(help="What they run.")] = "train",
    source: Source = None,
    profile: Profile = False,
    profile_steps: ProfileSteps = None,
) -> None:
    """Train with several processes on this machine.

    SIGTERM, SIGUSR1 or Ctrl-C lets all of them save and end with exit code 75; a second Ctrl-C ends
    them at once.

    Example: megaphase launch local run.yaml --processes 8
    """
    from megaphase.launch.exit_messages import training_exit_messages
    from megaphase.launch.local import ExitMessages, launch_local

    standard_output_is_a_log()
    options = train_options(source, profile, profile_steps)
    arguments = [command, str(run_file), *(overrides or []), *options]
    trains = command == "train"
    exit_messages = training_exit_messages(run_file, overrides or []) if trains else ExitMessages()
    sys.exit(launch_local(arguments, processes, exit_messages))


@launch_app.command("slurm")
def slurm_command(
    context: typer.Context,
    run_file: Annotated[
        Path | None, typer.Argument(metavar="RUN_FILE", help="The run file (YAML).")
    ] = None,
    overrides: Overrides = None,
    pipeline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Submit a chain of jobs instead; see docs/slurm.md."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, max=MOST, help="How many.")] = 1,
    gpus_per_node: Annotated[
        int,
        typer.Option(min=0, max=MOST, help="As many processes run on a node; 0 trains on CPUs."),
    ] = 8,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Processes of a node without GPUs.")
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="CPU cores of each process.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Limit of one start, as 24:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="As for sbatch.")] = None,
    account: Annotated[str | None, typer.Option(help="As for sbatch.")] = None,
    sbatch: Annotated[
        str, typer.Option(help="More options of sbatch: '--qos=high --constraint=ib'.")
    ] = "",
    memory: Annotated[
        float,
        typer.Option(
            min=1, max=1e9, callback=finite, help="GB of memory of one GPU, as it is sold."
        ),
    ] = 80.0,
    restarts: Annotated[
        int,
        typer.Option(min=0, max=MOST, help="How often in a row it starts again without progress."),
    ] = 3,
    exclude_bad_nodes: Annotated[
        bool,
        typer.Option(
            "--exclude-bad-nodes", help="Start again without nodes that fail their check."
        ),
    ] = False,
    source: Source = None,
    profile: Profile = False,
    profile_steps: ProfileSteps = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the batch script, submit nothing.")
    ] = False,
) -> None:
    """Check a run, build its plan, and submit it as a SLURM job.

    The job saves before its time limit and when it is preempted, and queues itself again until all
    phases are done.

    Example: megaphase launch slurm run.yaml --nodes 4 --time 24:00:00 --partition gpu
    """
    import shlex

    from megaphase.utils.errors import InputError
    from megaphase.utils.slurm import require_sbatch

    if not dry_run:
        require_sbatch("launch slurm", "run it on a login node, or add --dry-run")
    if pipeline is not None:
        _submit_pipeline(pipeline, context, dry_run=dry_run)
        return
    from megaphase.launch.slurm.script import Resources, sbatch_options
    from megaphase.launch.slurm.submit import check, script_for, submit_run

    if run_file is None:
        raise InputError("launch slurm", "there is no run file", "give one, or --pipeline")
    named = {"time": time, "partition": partition, "account": account}
    given = [f"--{key}={value}" for key, value in named.items() if value is not None]
    resources = Resources(
        nodes=nodes,
        tasks_per_node=gpus_per_node or tasks_per_node or 1,
        gpus=gpus_per_node > 0,
        cores=cores,
        options=[*given, *sbatch_options(sbatch)],
        exclude_bad_nodes=exclude_bad_nodes,
        restarts=restarts,
    )
    console = new_console(stderr=True, highlight=False)
    config = check(run_file, overrides or [], source, resources, memory, console)
    options = train_options(source, profile, profile_steps)
    script = script_for(config, overrides or [], options, resources)
    if dry_run:
        print(script, end="")
        return
    job = submit_run(config, script)
    print(f"Submitted: job {job.job}")
    print(f"Log: {job.log}")
    logs = shlex.quote(job.log.removesuffix(".log"))
    print(f"Follow it: tail -F {logs}*.log")
    print(f"Look at it: megaphase launch status {shlex.quote(str(config.output))}")


def _submit_pipeline(path: Path, context: typer.Context, *, dry_run: bool) -> None:
    from megaphase.launch.slurm.pipeline import load_pipeline, scripts, submit_pipeline
    from megaphase.utils.errors import InputError

    for name in context.params:
        source = context.get_parameter_source(name)
        if (
            name not in ("pipeline", "dry_run")
            and source is not None
            and source.name == "COMMANDLINE"
        ):
            raise InputError(f"--pipeline {path}", f"{name} is given, too", "put it into the file")
    pipeline = load_pipeline(path, context.find_root().command)
    if dry_run:
        for name, script in scripts(pipeline).items():
            after = ", ".join(pipeline.steps[name].after) or "nothing"
            print(f"# {name}, after {after}\n{script}")
        return
    jobs = submit_pipeline(pipeline)
    for name, job in jobs.items():
        print(f"Submitted: {name}, job {job}")
    print(f"Output: {pipeline.logs_folder}")
    print(f"Follow: squeue --jobs {','.join(jobs.values())}")


@launch_app.command("status")
def status_command(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Directories of runs.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON, an object a run.")] = False,
) -> None:
    """Show where runs stand: job, phase, step, loss, speed, remaining time, restarts.

    Example: megaphase launch status runs/multilingual
    """
    from json import dumps

    from megaphase.launch.slurm.status import as_text, read_status, status_as_json

    for number, run_dir in enumerate(run_dirs):
        status = read_status(run_dir)
        if json:
            print(dumps(status_as_json(status)))
        else:
            print("\n" * (number > 0) + as_text(status), end="")


@launch_app.command("check-node")
def check_node_command(
    run_file: RunFile,
    overrides: Overrides = None,
    source: Source = None,
    profile: Profile = False,
    profile_steps: ProfileSteps = None,
    gpus: Annotated[
        int,
        typer.Option(min=0, max=MOST, envvar="SLURM_GPUS_ON_NODE", help="How many it must have."),
    ] = 0,
    shared_memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e9,
            callback=finite,
            help="GB that /dev/shm must have free; 1 with GPUs, else 0.",
        ),
    ] = None,
    clock: Annotated[
        float | None,
        typer.Option(
            callback=finite, envvar="MEGAPHASE_CLOCK", help="Seconds since 1970 on the first node."
        ),
    ] = None,
    clock_seconds: Annotated[
        float,
        typer.Option(min=0, callback=finite, help="How far from that its clock may be."),
    ] = 300.0,
) -> None:
    """Look whether this node can take part in a run; prints its name if so.

    Batch scripts run it on every node before they train, with the arguments of the training; the
    options --from and --profile change nothing here.
    """
    import os
    import socket

    from megaphase.config.load import load_run_file
    from megaphase.launch.slurm.node import Demands, faults
    from megaphase.utils.errors import InputError, RunError

    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    try:
        config = load_run_file(run_file, tuple(overrides or ()))
    except InputError as error:
        raise InputError(f"node {node}: {error.where}", error.problem, error.remedy) from None
    demands = Demands(
        output=config.output,
        gpus=gpus,
        shared_memory_gb=float(gpus > 0) if shared_memory is None else shared_memory,
        clock=clock,
        clock_seconds=clock_seconds,
    )
    if found := list(faults(demands)):
        raise RunError(f"node {node}: {'; '.join(found)}")
    print(node)


@launch_app.command("next", hidden=True)
def next_command(
    run_file: RunFile,
    overrides: Overrides = None,
    source: Source = None,
    profile: Profile = False,
    profile_steps: ProfileSteps = None,
    code: Annotated[
        int, typer.Option(min=0, max=255, help="With which the processes have ended.")
    ] = 0,
    restarts: Annotated[int, typer.Option(min=0, max=MOST, help="See `launch slurm`.")] = 3,
    bad_nodes: Annotated[str, typer.Option(help="That have failed their check.")] = "",
    exclude: Annotated[
        bool, typer.Option("--exclude", help="Start again without the bad nodes.")
    ] = False,
) -> None:
    """Decide what follows after a start of a job; batch scripts end with it.

    They give it the arguments of the training, as they do `check-node`.
    """
    import os

    from megaphase.config.load import load_run_file
    from megaphase.launch.slurm.requeue import (
        decide,
        newest_step,
        queue_again,
        read_restart_history,
        too_few_nodes,
        write_restart_history,
    )
    from megaphase.launch.slurm.status import ended_diverged

    output = load_run_file(run_file, tuple(overrides or ())).output
    job = os.environ.get("SLURM_JOB_ID", "")
    history = read_restart_history(output, job).after_start(newest_step(output))
    write_restart_history(output, history)
    bad = ",".join(bad_nodes.split())
    if bad and not exclude:
        _end_job(job, f"not started: {bad} did not pass the check of nodes, see above", code)
    following = decide(history, code, restarts, diverged=ended_diverged(output))
    if bad and following.again and (reason := too_few_nodes(job, bad)):
        _end_job(job, f"not started, and not queued again: {reason}", code)
    without = f", without {bad}" if bad and following.again else ""
    print(f"megaphase: job {job}: {following.sentence}{without}", flush=True)
    if following.again:
        queue_again(job, leave_out=bad)
    sys.exit(following.exit_code)


def _end_job(job: str, sentence: str, code: int) -> NoReturn:
    print(f"megaphase: job {job}: {sentence}", flush=True)
    sys.exit(code)


def demo_command(
    folder: Annotated[
        Path,
        typer.Argument(
            callback=named, metavar="DIR", help="Where everything goes; must not exist."
        ),
    ] = Path("demo"),
) -> None:
    """From raw text to a two-phase-trained model and its report, in under five minutes.

    Makes four artificial languages that share structure but not words, two with little text, and
    runs the whole pipeline on them: every command is shown as it is run.
    """
    from megaphase.launch.demo import run_demo

    standard_output_is_a_log()
    run_demo(folder)
