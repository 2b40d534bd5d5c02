"""Files that are hashed while they are written, through the page cache or past it.

Written past the page cache (O_DIRECT), a file costs a third of the processor time, and is on the
disk when it is closed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megaphase.utils.files import new_hash, write_all

Bytes = npt.NDArray[np.uint8]

_CHUNK_BYTES = 1 << 20
_FLUSH_BYTES = 1 << 26
# Offsets, sizes and addresses of direct writes are multiples of this.
BLOCK_BYTES = 4096
_STAGING_BYTES = 1 << 20
_SMALL_BYTES = 1 << 15
DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux has it


class HashedFile(Protocol):
    """A new file, written from its beginning to its end.

    Attributes:
        size: bytes written so far.
    """

    size: int

    def write(self, content: Bytes) -> None:
        """Append bytes [n]."""
        ...

    def close(self) -> dict[str, Any]:
        """Flush the file to disk and return its manifest entry, `bytes` and `hash`."""
        ...

    def abandon(self) -> None:
        """Close the file without completing it."""
        ...


class WriteBehind:
    """Makes Linux start writing a file's pages to disk while the file grows.

    Otherwise most of it would still be in memory when it is flushed at the end.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._begun = descriptor, 0

    def reached(self, size: int) -> None:
        """Start writing the pages of a file that now has `size` bytes; does not wait."""
        length = size - self._begun
        if length >= _FLUSH_BYTES:
            os.posix_fadvise(self._descriptor, self._begun, length, os.POSIX_FADV_DONTNEED)
            self._begun = size


class CachedFile:
    """A file written through the page cache; see HashedFile."""

    def __init__(self, path: Path) -> None:
        self._digest, self.size = new_hash(), 0
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._to_disk = WriteBehind(self._file.fileno())

    def write(self, content: Bytes) -> None:
        for first in range(0, len(content), _CHUNK_BYTES):
            chunk = memoryview(content[first : first + _CHUNK_BYTES])  # type: ignore[arg-type]
            write_all(self._file.fileno(), chunk)
            self._digest.update(chunk)
            self.size += len(chunk)
            self._to_disk.reached(self.size)

    def close(self) -> dict[str, Any]:
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.size, "hash": self._digest.hexdigest()}

    def abandon(self) -> None:
        self._file.close()


class DirectFile:
    """A file written past the page cache, where the file system allows it; see HashedFile.

    Each of its writers may be another thread, one at a time. What does not fill a block waits in
    memory, less than 32 KiB of a file.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._direct = True
        try:
            self._descriptor = os.open(path, flags | DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:  # as of a file system without direct access
                raise
            self._descriptor, self._direct = os.open(path, flags, 0o666), False
        self._digest, self.size = new_hash(), 0
        self._rest = np.empty(0, np.uint8)
        self._begun: list[Future[None]] = []

    def write(self, content: Bytes) -> None:
        if len(self._rest) + len(content) < _SMALL_BYTES:
            self._digest.update(content)
            self._rest = np.concatenate([self._rest, content])
            self.size += len(content)
            return
        staging = _staging_of_this_thread()
        place = self.size - len(self._rest)
        buffer, filled = staging.free_buffer(), len(self._rest)
        buffer[:filled] = self._rest
        self.size += len(content)
        while len(content):
            chunk = content[: min(len(buffer) - filled, _CHUNK_BYTES)]
            self._digest.update(chunk)
            np.copyto(buffer[filled : filled + len(chunk)], chunk)  # lets other threads work
            filled, content = filled + len(chunk), content[len(chunk) :]
            if filled == len(buffer):
                self._begin(staging, filled, place)
                place += filled
                buffer, filled = staging.free_buffer(), 0
        blocks = filled - filled % BLOCK_BYTES
        self._rest = buffer[blocks:filled].copy()
        if blocks:
            self._begin(staging, blocks, place)

    def close(self) -> dict[str, Any]:
        try:
            self._wait()
            self._write_through_cache()
            self._write(self._rest, self.size - len(self._rest))
            os.fsync(self._descriptor)
        finally:
            self.abandon()
        return {"bytes": self.size, "hash": self._digest.hexdigest()}

    def abandon(self) -> None:
        for each in self._begun:
            each.exception()  # waits: no other file may get this descriptor before
        self._begun = []
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _begin(self, staging: _Staging, size: int, place: int) -> None:
        done = [each for each in self._begun if each.done()]
        for each in done:
            each.result()
            self._begun.remove(each)
        self._begun.append(staging.begin(self._write, size, place))

    def _wait(self) -> None:
        for each in self._begun:
            each.result()

    def _write(self, content: Bytes, place: int) -> None:
        """Write all bytes at a position of the file."""
        rest = memoryview(content)  # type: ignore[arg-type]
        while rest:
            try:
                written = os.pwrite(self._descriptor, rest, place)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._write_through_cache()  # its blocks are larger, or the last write was short
                continue
            rest, place = rest[written:], place + written

    def _write_through_cache(self) -> None:
        if self._direct and DIRECT:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~DIRECT)
        self._direct = False


class _Staging:
    """Two aligned buffers of one thread: one is filled while the other one is written to disk."""

    def __init__(self) -> None:
        self._buffers = [np.frombuffer(mmap.mmap(-1, _STAGING_BYTES), np.uint8) for _ in range(2)]
        self._writes: list[Future[None] | None] = [None, None]
        self._current = 0
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")

    def free_buffer(self) -> Bytes:
        """Return the current buffer once it has been written."""
        if (write := self._writes[self._current]) is not None:
            write.exception()  # waits; the file that it belongs to raises it
            self._writes[self._current] = None
        return self._buffers[self._current]

    def begin(self, write: Any, size: int, place: int) -> Future[None]:
        """Begin to write the first bytes of the current buffer, and change to the other one."""
        future = self._disk.submit(write, self._buffers[self._current][:size], place)
        self._writes[self._current] = future
        self._current = 1 - self._current
        return future


_local = threading.local()


def _staging_of_this_thread() -> _Staging:
    if not hasattr(_local, "staging"):
        _local.staging = _Staging()
    staging: _Staging = _local.staging
    return staging
