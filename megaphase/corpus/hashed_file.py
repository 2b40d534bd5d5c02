"""A file that is written aside and hashed on the way to the disk."""

from __future__ import annotations

import fcntl
import glob
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaphase.corpus.manifest import FileRecord
from megaphase.files import new_hash, path_aside

_CHUNK_BYTES = 1 << 20


class HashedFile:
    """Written under a scratch name beside `final`: `write`, then `finish`, then `publish`.

    The scratch file is locked while it is written, so that one without a lock is known to be what
    a killed process left behind; the next writer of `final` removes it.
    """

    def __init__(self, final: Path) -> None:
        _remove_abandoned(final)
        self._final = final
        self._aside = path_aside(final)
        self._file = open(self._aside, "wb", buffering=_CHUNK_BYTES)  # noqa: SIM115
        # Some network file systems know no locks.
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._digest = new_hash()
        self._bytes = 0

    def write(self, data: Any) -> None:
        """Append the bytes of any contiguous buffer."""
        view = memoryview(data).cast("B")
        # In chunks, so that what is hashed is still in the cache when it is copied.
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            self._digest.update(chunk)
            self._file.write(chunk)
        self._bytes += len(view)

    def finish(self) -> FileRecord:
        """Force everything to the disk; size and digest of what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileRecord(bytes=self._bytes, hash=self._digest.hexdigest())

    def publish(self) -> None:
        """Give the finished file its name."""
        os.replace(self._aside, self._final)
        self._file.close()

    def discard(self) -> None:
        """Remove what was written, unless it was published."""
        # Closing writes what is left, which a full disk refuses.
        with suppress(OSError):
            self._file.close()
        self._aside.unlink(missing_ok=True)


def _remove_abandoned(final: Path) -> None:
    for aside in final.parent.glob(f".{glob.escape(final.name)}.*.partial"):
        with suppress(OSError), open(aside, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            aside.unlink()
