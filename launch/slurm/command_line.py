"""Check the command of a pipeline's step and insert the number of its task."""

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
    """Replace %task by the number of a task, or by a shell variable that holds it."""
    values = {"%task": task, "%tasks": str(tasks or 1)}

    def fill(found: re.Match[str]) -> str:
        # A shell does not expand variables between single quotes.
        before, after = ("'", "'") if found[0].startswith("'") else ("", "")
        return PLACEHOLDER.sub(lambda name: f"{before}{values[name[0]]}{after}", found[0])

    return _QUOTED_OR_NOT.sub(fill, line)


def parsed(where: str, line: str, program: Any) -> dict[str, Any]:
    """Return the arguments of a command line by name, if there is such a command.

    where: the key, for messages. program: the `megaphase` app, of which nothing is run.

    Raises:
        InputError: there is no such command, or it does not have such options.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise InputError(where, f"cannot be parsed ({error})", "check its quotes") from None
    if "\n" in line.strip():
        raise InputError(where, "has more than one line", "write `>-` before it, not `|`")
    if words[:1] == ["megaphase"]:
        raise InputError(where, "begins with megaphase", "leave that word out")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a group without a command prints its help
            return _parse(program, "megaphase", words)
    except typer.Exit:
        raise InputError(where, "only shows help", "leave --help or --version out") from None
    except Exception as error:
        # typer's errors have no public base class; all of them have this method.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "megaphase")
        problem = " ".join((message() or "something is missing after it").split()).rstrip(".")
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
