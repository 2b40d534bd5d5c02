"""How far reading has come: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

PLAIN_LINE_SECONDS = 10.0

Advance = Callable[[int, int], None]
"""Called with the bytes of the files, and of what they hold, that were done since the last call."""


@contextmanager
def reading_progress(console: Console | None, what: str, total_bytes: int) -> Iterator[Advance]:
    """Show MB/s, decompressed, and the remaining time, by how much of the files' bytes is done."""
    if console is None:
        yield lambda file_bytes, data_bytes: None
    elif console.is_terminal:
        with _bar(console, what, total_bytes) as advance:
            yield advance
    else:
        yield _plain_lines(console, what, total_bytes)


@contextmanager
def bytes_progress(
    console: Console | None, what: str, total_bytes: int
) -> Iterator[Callable[[int], None]]:
    """Likewise for bytes that are what they are; the yielded function gets those done since, from
    any thread."""
    lock = threading.Lock()
    with reading_progress(console, what, total_bytes) as advance:

        def count(done: int) -> None:
            with lock:
                advance(done, done)

        yield count


@contextmanager
def _bar(console: Console, what: str, total_bytes: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    start, done = time.monotonic(), 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total_bytes, rate="")

        def advance(file_bytes: int, data_bytes: int) -> None:
            nonlocal done
            done += data_bytes
            rate = _megabytes_per_second(done, time.monotonic() - start)
            progress.update(task, advance=file_bytes, rate=rate)

        yield advance


def _plain_lines(console: Console, what: str, total_bytes: int) -> Advance:
    start = shown = time.monotonic()
    file_done = done = 0

    def advance(file_bytes: int, data_bytes: int) -> None:
        nonlocal shown, file_done, done
        file_done += file_bytes
        done += data_bytes
        now = time.monotonic()
        if now - shown < PLAIN_LINE_SECONDS or file_done == 0:
            return
        shown = now
        left = (now - start) * (total_bytes - file_done) / file_done
        rate = _megabytes_per_second(done, now - start)
        console.print(
            f"{what}: {100 * file_done / total_bytes:.0f}%, {rate}, about {left:.0f} s left",
            soft_wrap=True,
        )

    return advance


def _megabytes_per_second(data_bytes: int, seconds: float) -> str:
    return f"{data_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s"
