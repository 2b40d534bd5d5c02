"""The `megaphase` command: combines all subcommands and turns errors into exit codes."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Annotated, Any, NoReturn

import typer

from megaphase import __version__
from megaphase.convert.commands import convert_app
from megaphase.data_tools.commands import data_app
from megaphase.data_tools.tokenizers.commands import tokenizer_app
from megaphase.data_tools.vocabulary.commands import extend_vocab_command
from megaphase.distributed.dist_env import check_launch, is_first_rank, report_end
from megaphase.doctor.commands import doctor_command
from megaphase.evaluation.commands import evaluate_command
from megaphase.generation.commands import generate_command, translate_command
from megaphase.init.commands import init_command
from megaphase.launch.commands import demo_command, launch_app
from megaphase.plan.commands import plan_app
from megaphase.rehearsal.commands import rehearse_command
from megaphase.sweep.commands import report_command, sweep_command
from megaphase.sweep.law.commands import recommend_command
from megaphase.training.commands import train_command
from megaphase.utils.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_WRONG_INPUT,
    EndedAtOnce,
    InputError,
    Interrupted,
    LostProcessError,
    RunError,
    Stopped,
    exit_code,
    os_fault,
)
from megaphase.utils.locale_settings import require_utf8, work_in_utf8
from megaphase.utils.open_files import allow_many_open_files
from megaphase.utils.process_lifetime import end_with_parent
from megaphase.utils.signals import (
    handlers,
    interrupting_signals,
    unignored_signals,
)
from megaphase.utils.standard_streams import prepare_streams

SECONDS_FOR_RANK_0 = 1.0


class _Program(typer.Typer):
    """All commands."""

    def __call__(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run a command, by default that of this process.

        standalone_mode: end with SystemExit, as typer does, also after success.

        Raises:
            InputError: an option or an argument is wrong.
        """
        try:
            code = super().__call__(*arguments, standalone_mode=False, **options)
        except typer.Abort as error:
            # What typer's questions make of an interruption, too.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            print("megaphase: the input has ended", file=sys.stderr)
            code = EXIT_FAILED
        except Exception as error:
            # typer's errors have no public base class in all of its versions.
            message = getattr(error, "format_message", None)
            if message is None:
                raise
            problem = " ".join(message().split()).rstrip(".")
            if problem:
                command = getattr(getattr(error, "ctx", None), "command_path", "megaphase")
                raise InputError("", problem, f"see `{command} --help`") from None
            code = EXIT_WRONG_INPUT  # a group without a command has printed its help
        if standalone_mode:
            sys.exit(code)
        return code


app = _Program(
    help="Train multilingual GPT models in phases: first on the high-resource tasks, then, with "
    "fresh optimizer state and schedule, on a mixture that raises the low-resource ones.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 75 stopped by a signal "
    "(a training has saved), 130 ended at once by Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # so that paragraphs are wrapped to the terminal
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(plan_app, name="plan")
app.command("rehearse")(rehearse_command)
app.command("train")(train_command)
app.command("evaluate")(evaluate_command)
app.command("generate")(generate_command)
app.command("translate")(translate_command)
convert_app.command("extend-vocab")(extend_vocab_command)
app.add_typer(convert_app, name="convert")
app.command("sweep")(sweep_command)
app.command("report")(report_command)
app.command("recommend")(recommend_command)
app.add_typer(launch_app, name="launch")
app.command("init")(init_command)
app.command("doctor")(doctor_command)
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
    check_launch()
    allow_many_open_files()


def main() -> None:
    """Run the command; a user's mistake is one line on standard error, from one process."""
    work_in_utf8()
    prepare_streams()
    # When a rank dies, torch's own threads print pages about it; the watchdog reports it in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    end_with_parent()
    with interrupting_signals() as interrupts:
        try:
            require_utf8(sys.argv[1:])
            try:
                app()
            finally:
                sys.stdout.flush()  # here, where a failure can still be reported
        except (InputError, RunError, Stopped, EndedAtOnce) as error:
            _stop(error, exit_code(error))
        except BrokenPipeError:
            sys.exit(EXIT_FAILED)  # the reader of the output (head, less) has ended; not an error
        except OSError as error:
            fault = os_fault(error)
            if fault is None:
                raise
            # The other ranks do not know of it, so this one reports it, whatever its rank.
            print(f"megaphase: {fault}", file=sys.stderr, flush=True)
            sys.exit(exit_code(fault))
        except (KeyboardInterrupt, SystemExit) as error:
            # Typer turns an interruption into an exit code.
            if interrupts and _is_interrupt(error):
                _stop(interrupts[0], interrupts[0].exit_code)
            raise


def _is_interrupt(error: BaseException) -> bool:
    return isinstance(error, Interrupted) or getattr(error, "code", None) == EXIT_INTERRUPTED


def _stop(error: BaseException, code: int) -> NoReturn:
    text = f"stopped by {error.name}" if isinstance(error, Interrupted) else str(error)
    line = f"megaphase: {text}"
    with handlers(unignored_signals(), signal.SIG_IGN):  # the exit code is decided
        if isinstance(error, LostProcessError) and report_end(None, [line]):
            pass
        elif is_first_rank():
            print(line, file=sys.stderr, flush=True)
        else:
            # Launchers end all processes as soon as one has failed, so let rank 0 report first.
            time.sleep(SECONDS_FOR_RANK_0)
    sys.exit(code)
