"""File locks between processes, also on nodes of a cluster that share a file system."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megaphase.utils.set_aside import set_aside

_POLL_SECONDS = 0.2


@contextmanager
def exclusive_lock(path: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold the lock file while the block runs; `waiting` is called once if another process holds
    it.

    The lock is released when its process ends in any way. On a file system without locks, none is
    taken: the block must be harmless when two processes run it.
    """
    file = _acquire(path, waiting)
    try:
        yield
    finally:
        # Removed while still locked, so that a waiting process notices that the file is gone.
        with suppress(OSError):
            path.unlink()
        file.close()


def is_locked(path: Path) -> bool | None:
    """Return whether a process holds the lock file now, or None if that cannot be determined.

    On a file system shared by the nodes of a cluster, locks of other nodes may not be visible.
    """
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until the file is closed
    except FileNotFoundError:
        return False
    except OSError as error:
        return True if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return False


def _acquire(path: Path, waiting: Callable[[], object]) -> IO[bytes]:
    waiting_reported = False
    while True:
        # A process that failed may have removed the directory that it had created.
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = _open(path)
        except FileNotFoundError:
            continue
        try:
            tries = 0
            while not _try_lock(file):
                tries += 1
                # The first failure may be another process that only tests the lock.
                if tries > 1 and not waiting_reported:
                    waiting()
                    waiting_reported = True
                time.sleep(_POLL_SECONDS)
            if _is_still_there(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _open(path: Path) -> IO[bytes]:
    """Open the lock file; a directory or a link at its path is moved aside."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return open(os.open(path, flags, 0o666), "r+b", buffering=0)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise
    # If several processes find it, only one can rename it.
    with suppress(FileNotFoundError):
        set_aside(path, "a lock file")
    raise FileNotFoundError(path)


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR)
    return True


def _is_still_there(file: IO[bytes], path: Path) -> bool:
    """Return whether the locked file still exists at `path`, so that others would find it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
