"""The commands `megaphase sweep` and `report`; imports are inside functions to keep --help fast."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaphase.utils.arguments import MOST_PROCESSES, finite, named
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path
from megaphase.utils.standard_streams import (
    new_console,
    new_table_console,
    standard_output_is_a_log,
)

if TYPE_CHECKING:
    from rich.console import Console


def sweep_command(
    context: typer.Context,
    sweep_file: Annotated[
        Path, typer.Argument(metavar="SWEEP_FILE", help="The sweep file (YAML).")
    ],
    jobs: Annotated[
        int,
        typer.Option("--jobs", "-j", min=1, max=MOST_PROCESSES, help="Number of concurrent runs."),
    ] = 1,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", "--gpus", "-n", min=1, max=MOST_PROCESSES, help="Processes of each run."
        ),
    ] = 1,
    retry: Annotated[
        bool, typer.Option("--retry", help="Restart the runs that have failed.")
    ] = False,
    slurm: Annotated[
        bool,
        typer.Option(
            "--slurm", help="Submit the runs as SLURM arrays, as set in the file's section slurm."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check and list the runs without starting any; with --slurm, print the scripts.",
        ),
    ] = False,
    trial: Annotated[
        bool,
        typer.Option(
            "--trial", help="With --dry-run: time a few steps of each model here; takes minutes."
        ),
    ] = False,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="CARD", help="With --dry-run: compute the time on a GPU, such as h100-sxm."
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="HOURS",
            min=0,
            max=1e6,
            callback=finite,
            help="With --dry-run and --trial or --card: say what to leave out to fit in this time.",
        ),
    ] = None,
) -> None:
    """Train all arms of an experiment, such as static mixtures and two phases.

    If started again, it resumes; a run that has ended is never repeated.

    Example: megaphase sweep sweep.yaml --jobs 2
    """

    from megaphase.sweep.start import sweep

    console = new_console(highlight=False)
    planning = {"--trial": trial or None, "--card": card, "--budget": budget}
    for option, value in planning.items():
        if value is not None and (slurm or not dry_run):
            problem = "--slurm is also given" if slurm else "is for planning"
            remedy = "leave one out" if slurm else "add --dry-run"
            raise InputError(option, problem, remedy)
    if slurm:
        _sweep_on_slurm(context, sweep_file, console)
        return
    if dry_run:
        from megaphase.sweep.start import dry_run as print_plan

        print_plan(
            sweep_file,
            new_table_console(),
            jobs=jobs,
            processes=processes,
            trial=trial,
            card=card,
            budget=budget,
        )
        return
    standard_output_is_a_log()
    output = sweep(sweep_file, jobs=jobs, processes=processes, retry=retry, console=console)
    _report_all_ended(console, output)


def _sweep_on_slurm(context: typer.Context, sweep_file: Path, console: Console) -> None:
    from megaphase.sweep.slurm import next_scripts, sweep_on_slurm
    from megaphase.utils.slurm import require_sbatch

    for name in ("jobs", "processes"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"--{name}", "--slurm is also given", "set it in the sweep file's section slurm"
            )
    program = context.find_root().command
    if context.params["dry_run"]:
        for name, before, script in next_scripts(sweep_file, program):
            print(f"# {name}, after {', '.join(before) or 'nothing'}\n{script}")
        return
    require_sbatch("sweep --slurm", "run it on a login node, or add --dry-run")
    retry = context.params["retry"]
    standard_output_is_a_log()
    output = sweep_on_slurm(sweep_file, program, retry=retry, console=console)
    if output is not None:
        _report_all_ended(console, output)


def _report_all_ended(console: Console, output: Path) -> None:
    console.print(f"All runs have ended. Show results: megaphase report {output}", soft_wrap=True)


def report_command(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR", help="Directories of runs, or of one sweep."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            callback=named, help="Directory of the report; an earlier report there is replaced."
        ),
    ] = Path("report"),
) -> None:
    """Report on runs or on a sweep: tables, conclusions, and a page with plots."""

    from megaphase.sweep.directory import is_sweep

    # Records by the hundred thousand, none of them in cycles: looking for some takes a sixth of
    # the time.
    gc.set_threshold(200_000)
    console = new_table_console()
    sweeps = [folder for folder in run_dirs if is_sweep(folder)]
    if sweeps:
        index = _sweep_report(sweeps[0], run_dirs, out, console)
    else:
        index = _run_report(run_dirs, out, console)
    console.print(f"Report: {index}", markup=False, soft_wrap=True)


def _run_report(run_dirs: list[Path], out: Path, console: Console) -> Path:
    from megaphase.report.incidents import incident_sentences
    from megaphase.report.report import (
        differences_table,
        each_with_a_run,
        load_runs,
        summary_table,
        verdicts,
        write_report_of,
    )

    run_dirs, passed_over = each_with_a_run(run_dirs)
    runs = load_runs(run_dirs)
    index = write_report_of(runs, out)
    if passed_over:
        names = ", ".join(map(str, passed_over))
        console.print(f"Passed over, without a run: {names}", markup=False, soft_wrap=True)
    if (table := differences_table(runs)) is not None:
        console.print(table)
    for run in runs:
        console.print(summary_table(run))
        if run.hole is not None:
            console.print(f"Warning: {run.hole}", style="yellow", markup=False, soft_wrap=True)
        for sentence in incident_sentences(run):
            console.print(sentence, style="red", markup=False, soft_wrap=True)
        for sentence in verdicts(run):
            console.print(sentence, markup=False, soft_wrap=True)
        console.print()
    return index


def _sweep_report(sweep_dir: Path, given: list[Path], out: Path, console: Console) -> Path:
    from megaphase.sweep.pareto.report import SweepReport

    if len({real_path(folder) for folder in given}) > 1:
        raise InputError(
            sweep_dir, "is a sweep", "give it alone: a page shows either one sweep or runs"
        )
    report = SweepReport.of(sweep_dir)
    index = report.write(out)
    for table in report.summary_tables():
        console.print(table)
    for sentence in report.sentences():
        console.print(sentence, markup=False, soft_wrap=True)
    console.print()
    return index
