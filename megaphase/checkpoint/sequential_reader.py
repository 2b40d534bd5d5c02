"""Read a file from its beginning to its end in blocks, the next ones while one is used.

What is not in the page cache is read past it (O_DIRECT), which costs a third of the processor time.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np

from megaphase.checkpoint.hashed_file import BLOCK_BYTES, DIRECT, Bytes

_LARGEST_PIECE_BYTES, _LEAST_PIECE_BYTES = 1 << 20, 1 << 17
_ALL_FILES_BYTES = 1 << 24
_PIECES_AHEAD = 2
_ONLY_CACHED: int = getattr(os, "RWF_NOWAIT", 0)  # Linux has it


class SequentialReader:
    """Reads one file; the files are open and the buffers exist from the first call to the end.

    Attributes:
        position: of the byte that `next_piece` begins with.
    """

    def __init__(self, path: Path, size: int, disk: Executor, files: int) -> None:
        """
        Args:
            size: of the file, in bytes.
            disk: its threads wait for the disk.
            files: how many are read at the same time, at most.
        """
        self._path, self._size, self._disk, self.position = path, size, disk, 0
        share = _ALL_FILES_BYTES // (files * (_PIECES_AHEAD + 1))
        share = min(max(share, _LEAST_PIECE_BYTES), _LARGEST_PIECE_BYTES)
        self._piece_bytes = share - share % BLOCK_BYTES
        self._free: list[Bytes] = []
        self._pending: deque[tuple[Future[int], Bytes]] = deque()
        self._asked = 0
        self._cached = self._direct = -1
        self._used: Bytes | None = None

    def next_piece(self) -> Bytes:
        """Return the next bytes of the file, valid until the next call; none at its end."""
        if self._cached < 0:
            self._open()
        if self._used is not None:
            self._free.append(self._used)
            self._used = None
        while self._free and self._asked < self._size:
            buffer = self._free.pop()
            self._pending.append((self._disk.submit(self._read, buffer, self._asked), buffer))
            self._asked += len(buffer)
        if not self._pending:
            self.close()
            return np.empty(0, np.uint8)
        future, buffer = self._pending.popleft()
        self._used = buffer
        length = min(future.result(), self._size - self.position)
        self.position += length
        return buffer[:length]

    def close(self) -> None:
        """Close the file."""
        for future, _ in self._pending:
            future.cancel()
            if not future.cancelled():
                future.exception()  # waits
        self._pending.clear()
        self._free.clear()
        self._used = None
        for descriptor in {self._cached, self._direct} - {-1}:
            os.close(descriptor)
        self._cached = self._direct = -1

    def _open(self) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC
        self._cached = os.open(self._path, flags)
        self._direct = self._cached
        if self._size > self._piece_bytes:
            try:
                self._direct = os.open(self._path, flags | DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:  # as of a file system without direct access
                    raise
        pieces = min(_PIECES_AHEAD + 1, -(-self._size // self._piece_bytes))
        self._free = [
            np.frombuffer(mmap.mmap(-1, self._piece_bytes), np.uint8) for _ in range(pieces)
        ]

    def _read(self, buffer: Bytes, offset: int) -> int:
        """Fill a buffer from `offset` on; return the number of bytes, fewer at the file's end."""
        wanted = min(len(buffer), self._size - offset)
        if self._direct != self._cached and self._read_cached(buffer[:wanted], offset):
            return wanted
        done, memory = 0, memoryview(buffer)  # type: ignore[arg-type]
        while done < wanted:
            try:
                got = os.preadv(self._direct, [memory[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or self._direct == self._cached:
                    raise
                got = os.preadv(self._cached, [memory[done:]], offset + done)
            if got == 0:
                break
            done += got
        return done

    def _read_cached(self, buffer: Bytes, offset: int) -> bool:
        """Fill a buffer from the page cache, if all of the bytes are there."""
        try:
            memory = memoryview(buffer)  # type: ignore[arg-type]
            return os.preadv(self._cached, [memory], offset, _ONLY_CACHED) == len(memory)
        except OSError:  # they are not there, or the file system does not say
            return False
