"""Show the progress of building an index: a bar in a terminal, an occasional line in a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

from megaphase.plan.build_pool import ReportProgress
from megaphase.utils.progress import ProgressDisplay


@contextmanager
def building_progress(console: Console) -> Iterator[ReportProgress]:
    """Yield a function progress(what, done, of) that updates the console while the block runs.

    A short build prints nothing in a log.
    """
    columns = BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with ProgressDisplay(console, *columns, transient=True) as display:
        bar = display.add_bar("plan", None)
        shown = ""

        def progress(what: str, done: int, of: int) -> None:
            nonlocal shown
            if what != shown:
                shown = what
                bar.restart(what)
            bar.update(completed=done, total=of)
            display.line_when_due(lambda: f"plan: {what}, {done:,} of {of:,} samples")

        yield progress
