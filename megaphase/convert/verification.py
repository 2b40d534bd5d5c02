"""Verify a checkpoint while it is converted, so that its files are read from disk once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager

from rich.console import Console

from megaphase.convert.source import Advance, Source, verify_checkpoint
from megaphase.utils.errors import InputError
from megaphase.utils.progress import bytes_progress


@contextmanager
def verified_meanwhile(
    source: Source,
    nbytes: int,
    *,
    others: Sequence[Source] = (),
    workers: int,
    console: Console | None,
) -> Iterator[Advance]:
    """Let a block convert a checkpoint while other threads compare its files with the manifest.

    Data that one of the two has read from disk is in the page cache for the other. The block only
    ends normally if the files are intact, so its output must be published afterwards.

    Args:
        nbytes: number of bytes that the block will write. Yields a function that counts them.
        others: further checkpoints that the block reads.

    Raises:
        InputError: names the first file that is missing, truncated or altered.
    """
    given_up = threading.Event()
    sources = (source, *others)
    total = sum(each.nbytes for each in sources) + nbytes
    with bytes_progress(console, "converting", total) as advance, ThreadPoolExecutor(1) as pool:

        def count_verified(count: int) -> None:
            if given_up.is_set():
                raise CancelledError
            advance(count)

        def verify() -> None:
            for each in sources:
                verify_checkpoint(each.folder, workers=workers, advance=count_verified)

        work = pool.submit(verify)

        def count_written(count: int) -> None:
            if work.done():
                work.result()  # stop early if a file is damaged
            advance(count)

        try:
            yield count_written
            work.result()
        except InputError:
            work.result()  # the damage is the cause of the block's error
            raise
        finally:
            given_up.set()
