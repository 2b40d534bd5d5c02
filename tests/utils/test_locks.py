"""File locks: one process at a time, and what happens where the file system does not play along."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import IO

import pytest

from megaphase.utils import locks
from megaphase.utils.errors import RunError
from megaphase.utils.locks import exclusive_lock, is_locked

FORK = multiprocessing.get_context("fork")


def nobody_holds_it() -> None:
    pytest.fail("another process holds the lock")


def hold(path: Path, held: Event, leave: Event) -> None:
    with exclusive_lock(path, nobody_holds_it):
        held.set()
        leave.wait()


def hold_for(path: Path, held: Event, seconds: float) -> None:
    with exclusive_lock(path, nobody_holds_it):
        held.set()
        time.sleep(seconds)


@pytest.mark.parametrize(("patience", "is_refused"), [(60.0, False), (0.0, True)])
def test_who_is_patient_is_not_told_before_that(
    tmp_path: Path, patience: float, is_refused: bool
) -> None:
    path, held, told = tmp_path / "lock", FORK.Event(), []
    FORK.Process(target=hold_for, args=(path, held, 1.5)).start()
    held.wait()
    with exclusive_lock(path, lambda: told.append(True), patience):
        assert bool(told) == is_refused


def flock_that_fails(number: int, times: int) -> Callable[[object, int], None]:
    """flock as on a file system that refuses it so many times."""
    flock, left = fcntl.flock, iter(range(times))

    def fail(file: object, operation: int) -> None:
        if next(left, None) is not None:
            raise OSError(number, os.strerror(number))
        flock(file, operation)  # type: ignore[call-overload]

    return fail


def test_who_leaves_does_not_remove_the_lock_of_another_process(tmp_path):
    path, held, leave = tmp_path / "lock", FORK.Event(), FORK.Event()
    other = FORK.Process(target=hold, args=(path, held, leave), daemon=True)
    with exclusive_lock(path, nobody_holds_it) as locked:
        assert locked
        path.unlink()  # as a user does who takes it for a leftover
        other.start()
        assert held.wait(60)
    assert is_locked(path)
    with pytest.raises(BlockingIOError), exclusive_lock(path, refuse):
        pass
    leave.set()
    other.join()
    assert other.exitcode == 0
    assert not path.exists()


def refuse() -> None:
    raise BlockingIOError


def test_a_stale_handle_is_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0)
    monkeypatch.setattr(locks.fcntl, "flock", flock_that_fails(errno.ESTALE, 2))
    opened, open_file = [], locks._open

    def open_and_note(path: Path) -> IO[bytes]:
        opened.append(open_file(path))
        return opened[-1]

    monkeypatch.setattr(locks, "_open", open_and_note)
    with exclusive_lock(tmp_path / "lock", nobody_holds_it) as locked:
        assert locked
        assert [file.closed for file in opened] == [True, True, False]
        assert is_locked(tmp_path / "lock")
    assert opened[-1].closed


@pytest.mark.parametrize("name", ["EIO", "ETIMEDOUT", "EREMOTEIO", "ESTALE", "EPERM"])
def test_an_error_is_not_taken_for_the_lock(name, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0)
    number = getattr(errno, name)
    monkeypatch.setattr(locks.fcntl, "flock", flock_that_fails(number, 1000))
    with pytest.raises(RunError) as error, exclusive_lock(tmp_path / "lock", nobody_holds_it):
        pytest.fail("the block runs without the lock")
    assert str(error.value) == f"{tmp_path}/lock: cannot be locked ({os.strerror(number)})"


@pytest.mark.parametrize("name", ["ENOSYS", "EOPNOTSUPP", "ENOLCK", "EINVAL"])
def test_a_file_system_without_locks_is_said_once(name, tmp_path, monkeypatch, capfd):
    number = getattr(errno, name)
    monkeypatch.setattr(locks.fcntl, "flock", flock_that_fails(number, 1000))
    for folder in ("a", "a", "b"):
        with exclusive_lock(tmp_path / folder / "lock", nobody_holds_it) as locked:
            assert not locked
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    for line, folder in zip(lines, ("a", "b"), strict=True):
        assert line.startswith(
            f"{tmp_path}/{folder}/lock: its file system has no locks ({os.strerror(number)}): "
            f"a second process that uses {tmp_path}/{folder} at the same time is neither refused"
        )
