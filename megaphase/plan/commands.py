"""The command of this room; it imports what it needs, so that `--help` stays fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from megaphase.arguments import Overrides, RunFile

if TYPE_CHECKING:
    from rich.console import Console

# Columns of a table in a file or a pipe, where nothing needs to be folded.
PLAIN_WIDTH = 160


def plan_command(
    run_file: RunFile,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show tokens, sampling rates and epochs per phase and task, and build the plan's index."""
    from json import dumps

    from rich.console import Console

    from megaphase.config import load_run_file
    from megaphase.plan.plan import Plan, ensure_built
    from megaphase.plan.preview import plan_table, plan_warnings
    from megaphase.plan.spec import plan_spec
    from megaphase.tokenizer import Tokenizer

    config = load_run_file(run_file, tuple(overrides or ()))
    spec = plan_spec(config, Tokenizer.load(config.tokenizer))
    errors = Console(stderr=True, highlight=False)
    with _building_progress(errors) as progress:
        folder = ensure_built(
            spec,
            config.output,
            say=lambda text: errors.print(text, markup=False, soft_wrap=True),
            progress=progress,
        )
    summary = Plan(spec, folder).summary()
    if json:
        print(dumps(summary, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(plan_table(summary))
    for sentence in plan_warnings(summary):
        console.print(f"Warning: {sentence}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"Index: {folder}", markup=False, soft_wrap=True)


@contextmanager
def _building_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for the part of the index that is being built; nothing where there is no terminal."""
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("plan", total=None)
        shown = ""

        def progress(what: str, done: int, of: int) -> None:
            nonlocal shown
            if what != shown:
                shown = what
                bars.reset(bar, description=escape(what))
            bars.update(bar, completed=done, total=of)

        yield progress
