"""One process at a time, also among the nodes of a cluster that share a file system.

The lock is flock(2), which Linux turns into a byte-range lock on NFS, so that other nodes see it;
Lustre does so when it is mounted with `flock`. The kernel releases it when its process ends.

The package filelock makes the same call, so it is no better on network file systems, and for a run
directory it is worse in three ways. Where a file system has no flock it raises an error or falls
back to a marker file, which a killed process leaves behind and which then blocks every later start;
here the block runs without a lock. It does not remove the lock file, so that every run directory
and plan would keep one. And it cannot tell whether another process holds a lock without taking it,
which `is_locked` does for `launch status`.
"""

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
    """Hold the lock file while the block runs; `waiting` is called once if another holds it.

    The lock ends with the process that holds it, however that ends. A file system that knows no
    locks gives none: what the block does must be harmless when two processes do it.
    """
    file = _acquire(path, waiting)
    try:
        yield
    finally:
        # Removed while it is still held, so whoever waits for it finds that it is gone.
        with suppress(OSError):
            path.unlink()
        file.close()


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock file now; None where that cannot be told.

    A file system that only the nodes of a cluster share may show no lock of another node.
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
    told = False
    while True:
        # A process that failed may have taken away the directory that it had made.
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = _open(path)
        except FileNotFoundError:
            continue
        try:
            tries = 0
            while not _try_lock(file):
                tries += 1
                if tries > 1 and not told:  # the first time it may have been a look at the lock
                    waiting()
                    told = True
                time.sleep(_POLL_SECONDS)
            if _is_still_there(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _open(path: Path) -> IO[bytes]:
    """Open the lock file; a directory or a link that lies there is set aside."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return open(os.open(path, flags, 0o666), "r+b", buffering=0)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise
    # Of several processes that find it there, one renames it.
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
    """Whether the file that is locked is the one that others would find, or a removed one."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
