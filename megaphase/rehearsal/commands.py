"""`megaphase rehearse`; it imports what it needs, so `--help` stays fast."""

from __future__ import annotations

from typing import Annotated

import typer

from megaphase.utils.arguments import MOST, Overrides, Processes, RunFile
from megaphase.utils.standard_streams import new_console


def rehearse_command(
    run_file: RunFile,
    overrides: Overrides = None,
    processes: Processes = None,
    rank: Annotated[int, typer.Option(min=0, max=MOST, help="The rank that is rehearsed.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Run one rank of many on a GPU that does not exist, before the run is queued.

    The run's own model, optimizer and ZeRO stage take a few steps on tensors that have shapes but
    no values: a validation, a checkpoint saved and loaded, and a reset follow. Shows kernels,
    collectives, waits of the host and peak memory, and any error that the cluster would have shown.
    No GPU is used and nothing is written. Needs g++.

    Example: megaphase rehearse run.yaml --processes 512
    """
    from json import dumps

    from megaphase.rehearsal.summary import rehearse_run

    console = new_console(stderr=True)
    rehearsed = rehearse_run(run_file, overrides, processes, rank, console)
    if json:
        print(dumps(rehearsed.figures, indent=2))
    else:
        rehearsed.show(new_console())
    rehearsed.raise_fault()
