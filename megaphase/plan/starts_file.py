"""Write where the samples of all tasks begin: the part of the index that needs most time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.plan.build_pool import BuildPool
from megaphase.plan.hashed_chunks import HashedChunkWriter
from megaphase.plan.index import START_ALIGNMENT, STARTS_FILE
from megaphase.plan.phase_blend import SAMPLES_PER_CALL
from megaphase.plan.position import StreamPosition
from megaphase.plan.spec import PlanSpec
from megaphase.plan.task_documents import DOCUMENTS_PER_CALL
from megaphase.plan.task_stream import TaskStream
from megaphase.utils.errors import InputError

Pieces = list[list[Any]]  # [offset, bytes, hash] of every piece


class StartsFile:
    """The file in which all tasks' streams have where their samples begin; see index.py.

    The epochs that an earlier run has used up are holes in it.

    Attributes:
        regions: for every task, the first byte and the number of samples.
        rows: the number of samples that are written.
        written_bytes: the size of these samples, without the gaps of the file.
    """

    def __init__(self, folder: Path, spec: PlanSpec, used: Sequence[StreamPosition]) -> None:
        """used: where the streams are at the end of the plan, or beyond it."""
        self._path = folder / STARTS_FILE
        self._streams = list(spec.task_streams.values())
        self._sizes = [
            stream.index_sizes(first, last)
            for stream, first, last in zip(self._streams, spec.starts, used, strict=True)
        ]
        self._epochs = [
            stream.first_indexed_epoch(first)
            for stream, first in zip(self._streams, spec.starts, strict=True)
        ]
        self._to_write = [
            sum(sizes[epoch:]) for sizes, epoch in zip(self._sizes, self._epochs, strict=True)
        ]
        samples = [sum(each) for each in self._sizes]
        lengths = [
            _aligned(n * _row_bytes(stream))
            for stream, n in zip(self._streams, samples, strict=True)
        ]
        *first_bytes, self._bytes = accumulate(lengths, initial=0)
        self.regions = [[first, n] for first, n in zip(first_bytes, samples, strict=True)]
        self.rows = sum(self._to_write)
        rows_of = zip(self._streams, self._to_write, strict=True)
        self.written_bytes = sum(n * _row_bytes(stream) for stream, n in rows_of)

    @contextmanager
    def jobs(self, pool: BuildPool) -> Iterator[list[Callable[[], Pieces]]]:
        """Open the file and yield the jobs that write the tasks' parts."""
        with open(self._path, "wb", buffering=0) as file:
            os.ftruncate(file.fileno(), self._bytes)
            # The longest first, so that no thread is left with a long one at the end.
            tasks = sorted(range(len(self._streams)), key=lambda task: -self._to_write[task])
            yield [partial(self._write, task, file.fileno(), pool) for task in tasks]

    def described(self, written: Sequence[Pieces]) -> dict[str, Any]:
        """Return its entry in the header from the results of all jobs."""
        return {"bytes": self._bytes, "pieces": sorted(chain.from_iterable(written))}

    def _write(self, task: int, descriptor: int, pool: BuildPool) -> Pieces:
        stream, sizes, first_epoch = self._streams[task], self._sizes[task], self._epochs[task]
        skipped = sum(sizes[:first_epoch]) * _row_bytes(stream)
        writer = HashedChunkWriter(descriptor, self.regions[task][0] + skipped, pool.flusher)
        buffer = np.empty((min(SAMPLES_PER_CALL, max(sizes, default=0)), 2), stream.start_dtype)
        walk = None
        for epoch, size in enumerate(sizes[first_epoch:], first_epoch):
            walk = stream.walk(epoch, walk)
            while size > 0:
                filled = walk.fill(buffer[:size], DOCUMENTS_PER_CALL)
                writer.write(buffer[:filled])
                pool.advance(filled)
                size -= filled
                if size > 0 and walk.at_end:
                    raise InputError(stream.prefix, "changed while the plan was built",
                                     "start again")  # fmt: skip
        return writer.finish()


def _row_bytes(stream: TaskStream) -> int:
    return 2 * np.dtype(stream.start_dtype).itemsize


def _aligned(size: int) -> int:
    return -(-size // START_ALIGNMENT) * START_ALIGNMENT
