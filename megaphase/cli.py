"""The one command: it puts the rooms' commands together and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from megaphase import __version__
from megaphase.convert.commands import convert_app
from megaphase.data_tools.commands import data_app
from megaphase.data_tools.tokenizers.commands import tokenizer_app
from megaphase.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    InputError,
    RunError,
    Stopped,
    exit_code,
    os_fault,
)
from megaphase.experiments.commands import report_command, sweep_command
from megaphase.generation.commands import generate_command, translate_command
from megaphase.launch.commands import demo_command, launch_app
from megaphase.locale_settings import require_utf8, work_in_utf8
from megaphase.parallel.launcher import global_rank
from megaphase.parent import end_with_parent
from megaphase.plan.commands import plan_app
from megaphase.streams import prepare_streams
from megaphase.training.commands import evaluate_command, train_command

SECONDS_FOR_RANK_0 = 1.0

app = typer.Typer(
    help="Train multilingual GPT models in phases: first on the high-resource tasks, then, with "
    "fresh optimizer state and schedule, on a mixture that raises the low-resource ones.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 75 stopped on a signal "
    "after a checkpoint.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # so that paragraphs are wrapped to the terminal
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(plan_app, name="plan")
app.command("train")(train_command)
app.command("evaluate")(evaluate_command)
app.command("generate")(generate_command)
app.command("translate")(translate_command)
app.add_typer(convert_app, name="convert")
app.command("sweep")(sweep_command)
app.command("report")(report_command)
app.add_typer(launch_app, name="launch")
app.command("demo")(demo_command)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"megaphase {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; a user's mistake is one line on standard error, from one process."""
    work_in_utf8()
    prepare_streams()
    # When a rank dies torch's own threads fill pages about it; the watchdog says it in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    end_with_parent()
    try:
        require_utf8(sys.argv[1:])
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a failure can still be said
    except (InputError, RunError, Stopped) as error:
        _stop(error, exit_code(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(EXIT_FAILED)  # the reader of our output (head, less) has left; nothing is wrong
    except OSError as error:
        fault = os_fault(error)
        if fault is None:
            raise
        # The other ranks do not know of it, so this one says it whatever its number.
        print(f"megaphase: {fault}", file=sys.stderr, flush=True)
        sys.exit(exit_code(fault))


def _stop(error: Exception, code: int) -> None:
    if global_rank() == 0:
        print(f"megaphase: {error}", file=sys.stderr, flush=True)
    else:
        # Launchers end all processes as soon as one has failed: let rank 0 speak first.
        time.sleep(SECONDS_FOR_RANK_0)
    sys.exit(code)
