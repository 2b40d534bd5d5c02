"""Several processes that read: parts of a tokenization on one machine, each with its own workers.

One process feeds the workers of most machines. Where it cannot, since compressed files are read by
one process each, every reader tokenizes whole files, one after the other, to a corpus of its own;
these are merged.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from megaphase.data_tools.ordered_pool import ordered_map
from megaphase.data_tools.shards import ShardChoice
from megaphase.data_tools.text import STDIN, InputPath, can_be_ranged, size_on_disk
from megaphase.utils.progress import Advance, reading_progress

WORKERS_PER_READER = 64
_SECONDS = 0.5


def reader_count(inputs: Sequence[InputPath], workers: int) -> int:
    """Return how many processes should read, so that none has more than 64 workers; one if most of
    the text is in plain files, which workers read themselves."""
    sizes = {path: size_on_disk(path) for path in inputs if path != STDIN}
    read = [path for path in sizes if not can_be_ranged(path)]
    if STDIN in inputs or 2 * sum(sizes[path] for path in read) < sum(sizes.values()):
        return 1
    return max(1, min(len(read), -(-workers // WORKERS_PER_READER)))


def tokenize_parts(
    tokenize_part: Callable[[ShardChoice, Advance], object],
    readers: int,
    at_once: int,
    total_bytes: int,
    console: Console | None,
) -> None:
    """Tokenize every part in a process of its own.

    Args:
        tokenize_part: called in the other processes, with a function that counts bytes; pickled.
        readers: the number of parts.
        at_once: how many of them are tokenized at a time.
        total_bytes: of the files of all parts.
        console: where to show progress.

    Raises what it raises for the first part, in the order of the files, for which it does; and
    RunError if a process is killed.
    """
    spawn = multiprocessing.get_context("spawn")
    task = _Part(tokenize_part, readers, (spawn.Value("q", 0), spawn.Value("q", 0)))
    with (
        reading_progress(console, "tokenizing", total_bytes) as advance,
        _shown(task.counts, advance),
        closing(ordered_map(task, range(readers), at_once, with_children=True)) as parts,
    ):
        for _ in parts:
            pass


@dataclass(frozen=True)
class _Part:
    """The work of one reader; `counts`: bytes on disk and of text of all of them."""

    tokenize_part: Callable[[ShardChoice, Advance], object]
    of: int
    counts: tuple[Any, Any]

    def __call__(self, number: int) -> None:
        self.tokenize_part(ShardChoice(number, self.of, by_file=True), self._advance)

    def _advance(self, *sizes: int) -> None:
        for count, size in zip(self.counts, sizes, strict=True):
            with count.get_lock():
                count.value += size


@contextmanager
def _shown(counts: tuple[Any, Any], advance: Advance) -> Iterator[None]:
    """Show what other processes count while the block runs."""
    ended, shown = threading.Event(), [0, 0]

    def show() -> None:
        while not ended.wait(_SECONDS):
            now = [count.value for count in counts]
            advance(now[0] - shown[0], now[1] - shown[1])
            shown[:] = now

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
