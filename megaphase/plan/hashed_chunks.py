"""Write large files in pieces by several threads, with a hash for each piece.

A piece has at most PIECE_BYTES bytes, so that any number of threads can verify the whole, and a
reader only what it reads. The output is flushed to disk while it is written: the page cache does
not fill up with it, and a build that is stopped has little left to write.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megaphase.utils.files import hash_file, new_hash, size_damage

# As many as a window of samples has in the sample index of a corpus, see plan/stream.py.
PIECE_BYTES = 512 << 10
_CHUNK_BYTES = 1 << 20
_FLUSH_BYTES = 16 << 20


class HashedChunkWriter:
    """Writes one range of an open file sequentially."""

    def __init__(self, descriptor: int, offset: int, flusher: Executor) -> None:
        self._descriptor = descriptor
        self._flusher = flusher
        self._begin = self._end = offset
        self._digest = new_hash()
        self._pieces: list[list[Any]] = []
        self._unflushed = 0
        self._flush: Future[None] | None = None

    def write(self, data: Any) -> None:
        """Append the bytes of any contiguous buffer."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else view[:0]
        while view.nbytes:
            chunk = view[: min(_CHUNK_BYTES, self._begin + PIECE_BYTES - self._end)]
            self._digest.update(chunk)
            self._write_at_end(chunk)
            view = view[len(chunk) :]
            if self._end - self._begin == PIECE_BYTES:
                self._finish_piece()
        if self._unflushed >= _FLUSH_BYTES:
            self._wait()
            self._flush = self._flusher.submit(os.fdatasync, self._descriptor)
            self._unflushed = 0

    def finish(self) -> list[list[Any]]:
        """Wait until everything is written, and return [offset, bytes, hash] of every piece."""
        if self._end > self._begin:
            self._finish_piece()
        self._wait()
        return self._pieces

    def _write_at_end(self, chunk: memoryview) -> None:
        self._unflushed += len(chunk)
        while chunk:
            written = os.pwrite(self._descriptor, chunk, self._end)
            self._end += written
            chunk = chunk[written:]

    def _finish_piece(self) -> None:
        self._pieces.append([self._begin, self._end - self._begin, self._digest.hexdigest()])
        self._begin, self._digest = self._end, new_hash()

    def _wait(self) -> None:
        if self._flush is not None:
            self._flush.result()


def pieces_damage(path: Path, size: int, pieces: list[list[Any]], threads: int) -> str | None:
    """Return how a file differs from what was written, or None; compares the size first."""
    if damage := size_damage(path, size):
        return damage
    altered = threading.Event()

    def check(piece: list[Any]) -> None:
        if not altered.is_set() and hash_file(path, *piece[:2]) != piece[2]:
            altered.set()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(check, pieces))
    return "has been altered" if altered.is_set() else None
