"""The `megaphase doctor` command; imports are inside the functions to keep `--help` fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor_command(
    directory: Annotated[
        str,
        typer.Option(
            "--dir", metavar="DIR", help="A directory on the file system that runs are to be on."
        ),
    ] = ".",
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="This node must have GPUs; also build DeepSpeed's operator."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check what of this machine or node works: compiler, torch, GPUs, kernels, file system.

    Every line says ok, warning or fault, with the remedy. The exit code is 1 if there is a fault.
    Every check is bounded in time and in a process of its own.

    Example: megaphase doctor --gpu --dir /scratch/runs
    """
    from json import dumps

    from megaphase.doctor.display import print_result, print_summary
    from megaphase.doctor.doctor import (
        check_directory,
        counts,
        describe_machine,
        run_checks,
        summary,
    )
    from megaphase.doctor.finding import Settings
    from megaphase.utils.errors import EXIT_FAILED, InputError
    from megaphase.utils.standard_streams import new_console

    if not directory:
        raise InputError("--dir", "is empty", "give a directory, or leave it out for this one")
    check_directory(Path(directory))
    settings, results = Settings(Path(directory), gpu), []
    console = new_console(highlight=False)
    if not json:
        console.print(describe_machine(), soft_wrap=True)
    for result in run_checks(settings):
        results.append(result)
        if not json:
            print_result(console, result)
    if json:
        print(dumps(summary(results, settings), indent=2, ensure_ascii=False))
    else:
        print_summary(console, counts(results))
    if counts(results)["faults"]:
        raise typer.Exit(EXIT_FAILED)
