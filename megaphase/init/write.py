"""Asks, chooses, checks, writes the run file and says what it holds."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megaphase.init.choices import Choice, choose
from megaphase.init.questions import Options, answers_of
from megaphase.init.run_file import explanation, next_commands, write_run
from megaphase.init.validate import check_run
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_text, check_place
from megaphase.utils.standard_streams import new_console

RUNS = "runs"


def write_run_file(options: Options, output: Path | None, *, force: bool) -> None:
    """Write the run file; say what was chosen, and the commands that follow.

    Raises:
        InputError: an answer is wrong, nothing suits the answers, or the file exists.
    """
    out = options.out
    if (out.exists() or out.is_symlink()) and not force:
        raise InputError(out, "exists", "give another name, or --force to replace it")
    check_place(out)
    name = out.stem if out.stem != "run" else "multilingual"
    run = output or out.parent / RUNS / name
    _check_output(run)
    console = new_console(highlight=False)
    choice = choose(answers_of(options, console))
    content = write_run(choice, run)
    gpus = choice.answers.gpus
    check_run(content, out, choice.answers.tokenizer, gpus.count, gpus.memory_gb)
    atomic_write_text(out, content)
    _say(console, choice)


def _check_output(output: Path) -> None:
    """Raise InputError if the run directory cannot be made since a file is in its place."""
    for folder in (output, *output.absolute().parents):
        if folder.exists() and not folder.is_dir():
            raise InputError("--output", f"{folder} is no folder", "give a folder for the run")


def _say(console: Console, choice: Choice) -> None:
    lines = list(explanation(choice))
    width = max(len("warning"), *(len(name) for name, _ in lines))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=width)
    table.add_column(overflow="fold")
    for name, sentence in lines:
        table.add_row(Text(name, style="bold"), Text(sentence))
    for note in choice.notes:
        table.add_row(Text("warning", style="yellow"), Text(note, style="yellow"))
    console.print()
    console.print(table)
    console.print(f"\nWritten: {choice.answers.out}. Next:", soft_wrap=True)
    for command in next_commands(choice):
        console.print(f"  {command}", style="bold cyan", soft_wrap=True)
