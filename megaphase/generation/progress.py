"""Show the number of finished prompts in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from megaphase.utils.progress import ProgressDisplay


@contextmanager
def counting_progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a bar in a terminal, nothing elsewhere; yield a function that adds to the count."""
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True)
    with ProgressDisplay(console, *columns) as display:
        bar = display.add_bar(what, total)
        yield lambda count: bar.update(advance=count)
