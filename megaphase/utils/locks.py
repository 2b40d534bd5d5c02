"""File locks between processes, also on nodes of a cluster that share a file system."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from megaphase.utils.errors import RunError
from megaphase.utils.set_aside import say_on_standard_error, set_aside, shown_path

_POLL_SECONDS = 0.2
_STALE_TRIES = 25
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class _StaleHandleError(RunError):
    """The server of a network file system has lost the open file; it may have one at its path."""


@contextmanager
def exclusive_lock(
    path: Path, waiting: Callable[[], object], patience: float = 0.0
) -> Iterator[bool]:
    """Hold the lock file while the block runs; `waiting` is called once if another process holds
    it, and for longer than `patience` seconds.

    The lock is released when its process ends in any way. On a file system without locks, none is
    taken, and a line on standard error says so: the block gets False, and True otherwise.

    Raises:
        RunError: the file cannot be locked for another reason.
        OSError: it cannot be created.
    """
    file, held = _acquire(path, waiting, patience)
    try:
        yield held
    finally:
        # Removed while still locked, so that a waiting process notices that the file is gone. If
        # somebody removed it before, what lies there now may be the lock of another process.
        if _is_still_there(file, path):
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
        return True if error.errno in _HELD else None
    return False


def _acquire(path: Path, waiting: Callable[[], object], patience: float) -> tuple[IO[bytes], bool]:
    """Return the open lock file, and whether it is locked."""
    waiting_once, until = cache(waiting), time.monotonic() + patience
    stale = 0
    while True:
        # A process that failed may have removed the directory that it had created.
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = _open(path)
        except FileNotFoundError:
            continue
        with ExitStack() as opened:
            opened.enter_context(file)
            try:
                held = _lock(file, path, waiting_once, until)
            except _StaleHandleError:
                stale += 1
                if stale > _STALE_TRIES:
                    raise
                time.sleep(_POLL_SECONDS)
                continue
            if _is_still_there(file, path):
                opened.pop_all()
                return file, held


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


def _lock(file: IO[bytes], path: Path, waiting: Callable[[], object], until: float) -> bool:
    """Wait for the lock and take it; returns False, and says so, where there are no locks.

    until: time before which `waiting` is not called.
    """
    tries = 0
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _say_unprotected(path, error.strerror)
                return False
            if error.errno not in _HELD:
                kind = _StaleHandleError if error.errno == errno.ESTALE else RunError
                raise kind(f"{path}: cannot be locked ({error.strerror})") from error
        tries += 1
        # The first failure may be another process that only tests the lock.
        if tries > 1 and time.monotonic() >= until:
            waiting()
        time.sleep(_POLL_SECONDS)


@cache
def _say_unprotected(path: Path, reason: str | None) -> None:
    say_on_standard_error(
        f"{shown_path(path)}: its file system has no locks ({reason}): a second process that uses "
        f"{shown_path(path.parent)} at the same time is neither refused nor kept waiting; mount "
        "it with locks (Lustre: -o flock)"
    )


def _is_still_there(file: IO[bytes], path: Path) -> bool:
    """Return whether the locked file still exists at `path`, so that others would find it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
