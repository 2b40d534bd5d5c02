"""Verify a checkpoint while it is converted, so that its files are read from disk once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console

from megaphase.checkpoint.fetch import remedy_for_damage
from megaphase.checkpoint.hashed_reading import HashedReading, most_at_once
from megaphase.checkpoint.sequential_reader import SequentialReader
from megaphase.convert.source import Advance, Source, files_in_manifest
from megaphase.utils.errors import InputError
from megaphase.utils.files import file_damage, size_damage
from megaphase.utils.progress import bytes_progress


@contextmanager
def verified_meanwhile(
    source: Source,
    nbytes: int,
    *,
    order: Sequence[tuple[str, str]] = (),
    others: Sequence[Source] = (),
    workers: int,
    console: Console | None,
) -> Iterator[Advance]:
    """Let a block convert a checkpoint, and compare its files with the manifest.

    Files are hashed while the block reads them, as far as it does so in their order; the others,
    and the rest of these, by other threads. The block only ends normally if the files are intact,
    so its output must be published afterwards.

    Args:
        nbytes: number of bytes that the block will write. Yields a function that counts them.
        order: names and kinds of the parameters that the block reads, each once, in this order.
        others: further checkpoints that the block reads in the same order.

    Raises:
        InputError: names the first file that is missing, truncated or altered.
    """
    sources = (source, *others)
    total = sum(each.nbytes for each in sources) + nbytes
    with (
        bytes_progress(console, "converting", total) as advance,
        ThreadPoolExecutor(workers, thread_name_prefix="disk") as disk,
        ThreadPoolExecutor(workers, thread_name_prefix="verifier") as pool,
    ):
        verification = _Verification(pool, disk, advance, workers)
        try:
            try:
                for each in sources:
                    verification.begin(each, order)
                yield verification.count_written
                verification.finish()
            except InputError:
                verification.finish()  # the damage is the cause of the block's error
                raise
        finally:
            verification.given_up.set()
            for each in sources:
                each.weights.hash_by({})
            verification.close()


class _Verification:
    """The files of checkpoints that are compared with their manifests.

    Attributes:
        given_up: set when the comparison is no longer wanted.
    """

    def __init__(self, pool: Executor, disk: Executor, advance: Advance, workers: int) -> None:
        self.given_up = threading.Event()
        self._pool, self._disk, self._advance, self._workers = pool, disk, advance, workers
        self._files: list[_File] = []
        self._damage: InputError | None = None

    def begin(self, source: Source, order: Sequence[tuple[str, str]]) -> None:
        """Compare the files that are not read in order, and prepare to hash the others.

        Raises:
            InputError: the manifest is missing or damaged.
        """
        places = source.weights.places_in(order)
        files, readings = most_at_once(places.values()) + self._workers, {}
        for name, described in files_in_manifest(source.folder).items():
            file = _File(source, name, described)
            self._files.append(file)
            if places.get(name):
                path, start = source.folder / name, partial(self._start, file)
                reader = SequentialReader(path, described["bytes"], self._disk, files)
                reading = HashedReading(reader, path, places[name], self._count, when_read=start)
                readings[name] = file.reading = reading
            else:
                self._start(file)
        source.weights.hash_by(readings)

    def finish(self) -> None:
        """Wait until all files have been compared; raises InputError as `verified_meanwhile`."""
        for file in self._files:
            self._start(file)
        for file in self._files:
            assert file.work is not None
            if (error := file.work.result()) is not None:
                raise error

    def close(self) -> None:
        """Close the files that an error has left open."""
        for file in self._files:
            if file.reading is not None and file.work is None:
                file.reading.close()

    def count_written(self, count: int) -> None:
        """Count bytes of the block; raise InputError if a file is known to be damaged."""
        if self._damage is not None:
            raise self._damage
        self._advance(count)

    def _count(self, count: int) -> None:
        if self.given_up.is_set():
            raise CancelledError
        self._advance(count)

    def _start(self, file: _File) -> None:
        """Compare a file, of which no tensor will be read any more; once."""
        with file.lock:
            if file.work is None:
                file.work = self._pool.submit(self._compare, file)

    def _compare(self, file: _File) -> InputError | None:
        found = file.damage(self._count)
        if found is None:
            return None
        folder = file.source.folder
        error = InputError(folder / file.name, found, remedy_for_damage(folder))
        self._damage = self._damage or error
        return error


class _File:
    """A file of a checkpoint, its description in the manifest, and the work that compares them."""

    def __init__(self, source: Source, name: str, described: dict[str, Any]) -> None:
        self.source, self.name, self.described = source, name, described
        self.reading: HashedReading | None = None
        self.work: Future[InputError | None] | None = None
        self.lock = threading.Lock()

    def damage(self, advance: Advance) -> str | None:
        """Return how the file differs from its description, or None."""
        path = self.source.folder / self.name
        if self.reading is None:
            return file_damage(path, self.described, advance)
        size: int = self.described["bytes"]
        if found := size_damage(path, size):
            return found
        return None if self.reading.finish(size) == self.described["hash"] else "has been altered"
