"""Show the progress of work: a bar in a terminal, an occasional plain line elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int, int], None]
"""Called with the bytes on disk, and their decompressed bytes, processed since the last call."""


class ProgressDisplay:
    """Context manager that shows bars if the console is a terminal, and lines otherwise.

    Args:
        columns: the columns of every bar, after its description.
        transient: whether the bars disappear at the end.
    """

    def __init__(self, console: Console, *columns: ProgressColumn, transient: bool = False) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._last_line = time.monotonic()
        if console.is_terminal:
            description = TextColumn("{task.description}", markup=False)
            self._progress = Progress(description, *columns, console=console, transient=transient)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    @property
    def has_bars(self) -> bool:
        """Whether the console is a terminal."""
        return self._progress is not None

    def add_bar(
        self, description: str, total: int | None, *, done: int = 0, **fields: Any
    ) -> ProgressBar:
        """Add a bar; `fields` are the fields named in the columns."""
        if self._progress is None:
            return ProgressBar(None, TaskID(0))
        task = self._progress.add_task(description, total=total, completed=done, **fields)
        return ProgressBar(self._progress, task)

    def line_when_due(self, text: Callable[[], str]) -> None:
        """Print a line if there are no bars and no line was printed for some seconds."""
        now = time.monotonic()
        if self._progress is not None or now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        self._console.print(text(), markup=False, highlight=False, soft_wrap=True)


class ProgressBar:
    """One bar of a ProgressDisplay; does nothing if the display has no bars."""

    def __init__(self, progress: Progress | None, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, **values: Any) -> None:
        """Set `completed`, `total` or a field of a column, or `advance` by a number."""
        if self._progress is not None:
            self._progress.update(self._task, **values)

    def restart(self, description: str) -> None:
        """Start again with another description."""
        if self._progress is not None:
            self._progress.reset(self._task, description=description)

    def remove(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.remove_task(self._task)


@contextmanager
def reading_progress(console: Console | None, what: str, total_bytes: int) -> Iterator[Advance]:
    """Show decompressed MB/s and the remaining time, estimated from the bytes on disk."""
    if console is None:
        yield lambda file_bytes, data_bytes: None
        return
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    start = time.monotonic()
    file_done = done = 0
    with ProgressDisplay(console, *columns) as display:
        bar = display.add_bar(what, total_bytes, rate="")

        def line() -> str:
            seconds = time.monotonic() - start
            left = seconds * (total_bytes - file_done) / file_done
            rate = _megabytes_per_second(done, seconds)
            return f"{what}: {100 * file_done / total_bytes:.0f}%, {rate}, about {left:.0f} s left"

        def advance(file_bytes: int, data_bytes: int) -> None:
            nonlocal file_done, done
            file_done += file_bytes
            done += data_bytes
            rate = _megabytes_per_second(done, time.monotonic() - start)
            bar.update(advance=file_bytes, rate=rate)
            if file_done:
                display.line_when_due(line)

        yield advance


@contextmanager
def bytes_progress(
    console: Console | None, what: str, total_bytes: int
) -> Iterator[Callable[[int], None]]:
    """Like `reading_progress` for uncompressed bytes; the yielded function takes the bytes
    processed since its last call, from any thread."""
    lock = threading.Lock()
    with reading_progress(console, what, total_bytes) as advance:

        def count(done: int) -> None:
            with lock:
                advance(done, done)

        yield count


def _megabytes_per_second(data_bytes: int, seconds: float) -> str:
    return f"{data_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s"
