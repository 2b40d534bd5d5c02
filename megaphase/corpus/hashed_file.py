"""A file whose digest is computed while it is written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaphase.corpus.manifest import FileRecord
from megaphase.utils.files import HASH_CHUNK_BYTES, new_hash

_CHUNK_BYTES = 1 << 20


class HashedFile:
    """Appends to a file; `record` flushes it to disk and returns its size and digest."""

    def __init__(self, path: Path, size: int = 0) -> None:
        """Keep the first `size` bytes of an existing file, read them for the digest, and append."""
        self.path = path
        self._digest = new_hash()
        self._bytes = size
        if size:
            os.truncate(path, size)
            with open(path, "rb", buffering=0) as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    self._digest.update(chunk)
        self._file = open(path, "ab" if size else "wb", buffering=_CHUNK_BYTES)  # noqa: SIM115

    def write(self, data: Any) -> None:
        """Append the bytes of any contiguous buffer."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else view[:0]
        # In chunks, so that the hashed bytes are still in the cache when they are copied.
        for start in range(0, view.nbytes, _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            self._digest.update(chunk)
            self._file.write(chunk)
        self._bytes += view.nbytes

    @property
    def size(self) -> int:
        """Number of bytes written so far."""
        return self._bytes

    @property
    def digest(self) -> str:
        """Digest of all bytes written so far."""
        return str(self._digest.hexdigest())

    def record(self) -> FileRecord:
        """Flush everything to disk and return the size and digest of the file so far."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileRecord(bytes=self._bytes, hash=self.digest)

    def close(self) -> None:
        """Close the file."""
        # Closing flushes the buffer, which fails on a full disk.
        with suppress(OSError):
            self._file.close()
