"""A command of a pipeline's step: its words, its task's number, whether there is such a one."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from typing import Any

import typer

from megaphase.utils.errors import InputError

PLACEHOLDER = re.compile(r"%tasks?(?![A-Za-z])")
_QUOTED_OR_NOT = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^'"\\]+""", re.DOTALL)


def filled(line: str, task: str, tasks: int | None) -> str:
    """Put the number of a task, or a shell's variable that holds it, in the place of %task."""
    values = {"%task": task, "%tasks": str(tasks or 1)}

    def fill(found: re.Match[str]) -> str:
        # A shell does not look for variables between single quotes.
        before, after = ("'", "'") if found[0].startswith("'") else ("", "")
        return PLACEHOLDER.sub(lambda name: f"{before}{values[name[0]]}{after}", found[0])

    return _QUOTED_OR_NOT.sub(fill, line)


def parsed(where: str, line: str, program: Any) -> dict[str, Any]:
    """The arguments of a command line by their names, if there is such a command.

    where: the key, for messages. program: `megaphase` itself, of which nothing is run.

    Raises:
        InputError: there is no such command, or not with such options.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise InputError(where, f"cannot be taken apart ({error})", "check its quotes") from None
    if "\n" in line.strip():
        raise InputError(where, "has more than one line", "write `>-` before it, not `|`")
    if words[:1] == ["megaphase"]:
        raise InputError(where, "begins with megaphase", "leave that word out")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a group without a command shows its help
            return _parse(program, "megaphase", words)
    except typer.Exit:
        raise InputError(where, "only shows help", "leave --help or --version out") from None
    except Exception as error:
        # typer's errors have no public base class; this is how all of them say what is wrong.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "megaphase")
        problem = " ".join((message() or "something is missing behind it").split()).rstrip(".")
        raise InputError(where, problem, f"see `{command} --help`") from None


def _parse(command: Any, name: str, words: list[str], parent: Any = None) -> dict[str, Any]:
    """Parse a command line down to the last command in it."""
    context = command.make_context(name, list(words), parent=parent)
    if not hasattr(command, "resolve_command"):  # not a group of commands
        return dict(context.params)
    found_name, found, rest = command.resolve_command(
        context, [*context._protected_args, *context.args]
    )
    return _parse(found, found_name, rest, context)
