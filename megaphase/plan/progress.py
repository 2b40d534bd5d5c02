"""How far the building of an index is: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from megaphase.plan.build_pool import ReportProgress

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def building_progress(console: Console) -> Iterator[ReportProgress]:
    """Yield what shows progress(what, done, of) on the console while the block runs."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("plan", total=None)
        shown = ""

        def progress(what: str, done: int, of: int) -> None:
            nonlocal shown
            if what != shown:
                shown = what
                bars.reset(bar, description=escape(what))
            bars.update(bar, completed=done, total=of)

        yield progress


class _Lines:
    """Nothing for a build that takes a moment; otherwise a line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()

    def __call__(self, what: str, done: int, of: int) -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        line = f"plan: {what}, {done:,} of {of:,} samples"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
