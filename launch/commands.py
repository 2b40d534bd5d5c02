"""`megaphase launch ...` and `megaphase demo`: parse, call."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megaphase.arguments import Overrides, RunFile, Source

launch_app = typer.Typer(help="Start a run as several processes.", no_args_is_help=True)


@launch_app.callback()
def _launch() -> None:
    # With a callback the only command keeps its name: `launch local`.
    pass


@launch_app.command("local")
def local_command(
    run_file: RunFile,
    overrides: Overrides = None,
    processes: Annotated[
        int, typer.Option("--processes", "-n", min=1, help="One a GPU, or a few on the CPU.")
    ] = 1,
    command: Annotated[
        str, typer.Option(help="What they run: train or evaluate.", metavar="COMMAND")
    ] = "train",
    source: Source = None,
) -> None:
    """Train with several processes on this machine.

    SIGTERM or SIGUSR1 lets all of them save and end with exit code 75; Ctrl-C ends them at once.

    Example: megaphase launch local run.yaml --processes 8
    """
    from megaphase.launch.local import launch_local

    branch = [] if source is None else ["--from", source]
    sys.exit(launch_local([command, str(run_file), *(overrides or []), *branch], processes))


def demo_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where everything goes; must not exist.")
    ] = Path("demo"),
) -> None:
    """From raw text to a two-phase-trained model and its report, in under five minutes.

    Makes four artificial languages that share structure but not words, two with little text, and
    runs the whole pipeline on them: every command is shown as it is run.
    """
    from megaphase.launch.demo import run_demo

    run_demo(folder)
