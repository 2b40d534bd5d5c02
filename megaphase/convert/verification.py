"""A checkpoint is compared with its hashes while it is converted, so that it is read once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager

from rich.console import Console

from megaphase.convert.source import Advance, Source, verify_checkpoint
from megaphase.utils.errors import InputError
from megaphase.utils.progress import bytes_progress


@contextmanager
def verified_meanwhile(
    source: Source, nbytes: int, *, workers: int, console: Console | None
) -> Iterator[Advance]:
    """Let a block convert a checkpoint while other threads compare its files with the manifest.

    What one of the two has read from the disk the other finds in the page cache. The block ends
    well only if the comparison does; so what it writes must appear after that.

    nbytes: how many the block will write. Yields what it tells of those that it has written.

    Raises:
        InputError: naming the first file that is missing, truncated or altered.
    """
    given_up = threading.Event()
    total = source.nbytes + nbytes
    with bytes_progress(console, "converting", total) as advance, ThreadPoolExecutor(1) as pool:

        def count_verified(count: int) -> None:
            if given_up.is_set():
                raise CancelledError
            advance(count)

        work = pool.submit(
            verify_checkpoint, source.folder, workers=workers, advance=count_verified
        )

        def count_written(count: int) -> None:
            if work.done():
                work.result()  # there is no use in going on with a damaged file
            advance(count)

        try:
            yield count_written
            work.result()
        except InputError:
            work.result()  # damage is what made the block stumble
            raise
        finally:
            given_up.set()
