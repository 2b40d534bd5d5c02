"""The commands `megaphase launch ...` and `megaphase demo`: they parse options and call the
rest."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
            help="Number of processes: one per GPU, or a few on CPUs.",
        ),
    ] = 1,
    command: Annotated[
        Literal["train", "evaluate"], typer.Option(help="The command that they run.")
    ] = "train",
    source: Source = None,
    profile: Profile = False,
    profile_steps: ProfileSteps = None,
) -> None:
    """Train with several processes on this machine.

    SIGTERM, SIGUSR1 or Ctrl-C makes all of them save and exit with code 75; a second Ctrl-C ends
    them at once.

    Example: megaphase launch local run.yaml --processes 8

    Example: megaphase launch local runs/a@joint -n 8 --command evaluate -- --harness xstorycloze_en
    """
    from megaphase.launch.exit_messages import training_exit_messages
    from megaphase.launch.local import ExitMessages, launch_local

    standard_output_is_a_log()
    options = train_options(source, profile, profile_steps)
    arguments = [command, str(run_file), *(overrides or []), *options]
    trains = command == "train"
    exit_messages = training_exit_messages(run_file, overrides or []) if trains else ExitMessages()
    sys.exit(launch_local(arguments, processes, exit_messages))


def _memory(value: str | None) -> str | None:
    from megaphase.launch.slurm.script import check_memory

    return _checked(value, check_memory)


def _gpu_type(value: str | None) -> str | None:
    from megaphase.launch.slurm.script import check_gpu_type

    return _checked(value, check_gpu_type)


def _checked(value: str | None, check: Callable[[object], str]) -> str | None:
    try:
        return value if value is None else check(value)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from None


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
    nodes: Annotated[int, typer.Option(min=1, max=MOST, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[
        int,
        typer.Option(min=0, max=MOST, help="GPUs, and processes, per node; 0 trains on CPUs."),
    ] = 8,
    gpu_type: Annotated[
        str | None,
        typer.Option(callback=_gpu_type, help="Slurm's name of the GPUs' type, such as a100."),
    ] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Processes per node without GPUs.")
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="CPU cores per process.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of a start: 24:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM account.")] = None,
    mem: Annotated[
        str | None,
        typer.Option(
            callback=_memory, help="Main memory of each node: 480G, or 0 for all that it has."
        ),
    ] = None,
    exclusive: Annotated[
        bool, typer.Option("--exclusive", help="Share the nodes with no other job.")
    ] = False,
    sbatch: Annotated[
        str, typer.Option(help="More options for sbatch: '--qos=high --constraint=ib'.")
    ] = "",
    memory: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=1e9,
            callback=finite,
            help="Nominal memory of one GPU in GB; that of hardware.card if left out.",
        ),
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(min=0, max=MOST, help="Most restarts in a row without progress."),
    ] = 3,
    exclude_bad_nodes: Annotated[
        bool,
        typer.Option("--exclude-bad-nodes", help="Restart without nodes that fail their check."),
    ] = False,
    source: Source = None,
    profile: Profile = False,
    profile_steps: ProfileSteps = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the batch script, submit nothing.")
    ] = False,
) -> None:
    """Check a run, build its plan, and submit it as a SLURM job.

    The job saves before its time limit and when it is preempted, and requeues itself until all
    phases are done.

    Example: megaphase launch slurm run.yaml --nodes 4 --time 24:00:00 --partition gpu
    """
    import shlex

    from megaphase.utils.errors import InputError
    from megaphase.utils.slurm import require_sbatch, sbatch_options

    if not dry_run:
        require_sbatch("launch slurm", "run it on a login node, or add --dry-run")
    if pipeline is not None:
        _submit_pipeline(pipeline, context, dry_run=dry_run)
        return
    from megaphase.launch.slurm.script import DETERMINED, Resources, node_options
    from megaphase.launch.slurm.submit import check, script_for, submit_run

    if run_file is None:
        raise InputError("launch slurm", "there is no run file", "give one, or --pipeline")
    if tasks_per_node is not None and gpus_per_node:
        problem = "applies to nodes without GPUs"
        raise InputError("--tasks-per-node", problem, "add --gpus-per-node 0, or leave it out")
    if gpu_type is not None and not gpus_per_node:
        raise InputError("--gpu-type", "applies to nodes with GPUs", "leave it out")
    named = {"time": time, "partition": partition, "account": account}
    given = [f"--{key}={value}" for key, value in named.items() if value is not None]
    resources = Resources(
        nodes=nodes,
        tasks_per_node=gpus_per_node or tasks_per_node or 1,
        gpus=gpus_per_node > 0,
        cores=cores,
        options=[
            *given,
            *node_options(mem, exclusive=exclusive),
            *sbatch_options(sbatch, DETERMINED),
        ],
        exclude_bad_nodes=exclude_bad_nodes,
        restarts=restarts,
        gpu_type=gpu_type,
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
    print(f"Show its status: megaphase launch status {shlex.quote(str(config.output))}")


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
            raise InputError(f"--pipeline {path}", f"{name} is also given", "put it into the file")
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
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per run.")] = False,
) -> None:
    """Show the status of runs: job, phase, step, loss, speed, remaining time, restarts.

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
        typer.Option(min=0, max=MOST, envvar="SLURM_GPUS_ON_NODE", help="Required number of GPUs."),
    ] = 0,
    shared_memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e9,
            callback=finite,
            help="Free GB required in /dev/shm; 1 with GPUs, else 0.",
        ),
    ] = None,
    clock: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            envvar="MEGAPHASE_CLOCK",
            help="The first node's time (seconds since 1970).",
        ),
    ] = None,
    clock_seconds: Annotated[
        float,
        typer.Option(min=0, callback=finite, help="Largest difference of the clocks in seconds."),
    ] = 300.0,
) -> None:
    """Check whether this node can take part in a run; prints its name if so, and more otherwise.

    Batch scripts run it on every node before they train, with the arguments of the training;
    --from and --profile have no effect here.
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
        print(f"{node} did not pass", flush=True)
        raise RunError(f"node {node}: {'; '.join(found)}")
    print(node)


@launch_app.command("next", hidden=True)
def next_command(
    run_file: RunFile,
    overrides: Overrides = None,
    source: Source = None,
    profile: Profile = False,
    profile_steps: ProfileSteps = None,
    code: Annotated[int, typer.Option(min=0, max=255, help="Exit code of the processes.")] = 0,
    restarts: Annotated[int, typer.Option(min=0, max=MOST, help="See `launch slurm`.")] = 3,
    bad_nodes: Annotated[str, typer.Option(help="Nodes that failed their check.")] = "",
    exclude: Annotated[
        bool, typer.Option("--exclude", help="Restart without the bad nodes.")
    ] = False,
) -> None:
    """Decide what happens after a job's start has ended; called at the end of batch scripts.

    They pass the arguments of the training, as they do to `check-node`.
    """
    from megaphase.config.load import load_run_file
    from megaphase.launch.slurm.requeue import (
        decide,
        newest_step,
        queue_again,
        read_restart_history,
        too_few_nodes,
        write_restart_history,
    )
    from megaphase.launch.slurm.status import ended_diverged, has_ended_after
    from megaphase.utils.slurm import own_job

    config = load_run_file(run_file, tuple(overrides or ()))
    output, end = config.output, config.checkpoint.end_after
    job = own_job() or ""
    newest = newest_step(output)
    history = read_restart_history(output, job, newest).after_start(newest)
    write_restart_history(output, history)
    bad = ",".join(bad_nodes.split())
    if bad and not exclude:
        _end_job(job, f"not started: {bad} did not pass the node check, see above", code)
    end_after = end if code == 0 and has_ended_after(output, end) else None
    diverged = ended_diverged(output)
    following = decide(history, code, restarts, diverged=diverged, end_after=end_after)
    if bad and following.again and (reason := too_few_nodes(job, bad)):
        _end_job(job, f"not started, and not requeued: {reason}", code)
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
        typer.Argument(callback=named, metavar="DIR", help="Output folder; must not exist."),
    ] = Path("demo"),
) -> None:
    """Run the whole pipeline from raw text to a two-phase model and its report, in five minutes.

    Generates four synthetic languages that share structure but not words, two with little text,
    and runs the pipeline on them; every command is shown as it is run.
    """
    from megaphase.launch.demo import run_demo

    standard_output_is_a_log()
    run_demo(folder)
