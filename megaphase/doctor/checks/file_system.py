"""The file system of a directory: locks, renames, speed, space and clock."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from megaphase.doctor.finding import Finding, Settings, fault, ok, warning

MB, GB = 1e6, 1e9
# What the measurement of the speed writes at most, in bytes, seconds and of the free space.
MOST_BYTES, MOST_SECONDS, MOST_OF_FREE = 256 << 20, 5.0, 0.01
PIECE, SYNCED = 4 << 20, 64 << 20  # bytes of a write, and between two fsyncs
SLOW_MB_PER_S = 100.0
LITTLE_GB = 20.0
RENAMES = 50
LARGEST_SKEW, WORST_SKEW = 2.0, 60.0
LOCK_SECONDS = 10
# Tries to take a lock that the process that starts it holds; prints what happens.
RIVAL = """\
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("taken")
    except OSError:
        print("refused")
"""


@contextmanager
def _folder(settings: Settings) -> Iterator[Path]:
    with TemporaryDirectory(prefix=".megaphase-doctor-", dir=settings.directory) as folder:
        yield Path(folder)


def check_locks(settings: Settings) -> Iterator[Finding]:
    """Take a lock of each kind, which another process must then be refused."""
    with _folder(settings) as folder:
        problems = [
            problem
            for kind, needed in (("flock", True), ("lockf", False))
            for problem in _lock_problems(folder / kind, kind, needed, settings.directory)
        ]
    yield from problems
    if not problems:
        where = settings.directory
        yield ok(f"flock and fcntl locks exclude other processes of this node in {where}")


def _lock_problems(path: Path, kind: str, needed: bool, directory: Path) -> Iterator[Finding]:
    name = {"flock": "flock", "lockf": "fcntl"}[kind]
    remedy = (
        "mount the file system with locks (Lustre: -o flock; NFS: version 4 with its lock "
        "service), or start one command at a time in the same run directory"
    )
    with open(path, "w+b") as file:
        try:
            getattr(fcntl, kind)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = f"{directory} has no {name} locks ({error.strerror})"
            yield warning(text, remedy if needed else "megaphase itself needs flock alone")
            return
        rival = subprocess.run(
            [sys.executable, "-c", RIVAL, str(path), kind],
            capture_output=True,
            text=True,
            timeout=LOCK_SECONDS,
        )
    if rival.stdout.strip() == "refused":
        return
    if needed:
        yield fault(f"{name} locks in {directory} do not exclude other processes", remedy)
    else:
        yield warning(
            f"{name} locks in {directory} do not exclude other processes",
            "megaphase itself needs flock alone",
        )


def check_renames(settings: Settings) -> Iterator[Finding]:
    """Replace a file and publish a directory, with fsync, as checkpoints are."""
    remedy = "choose another file system for runs: checkpoints are written aside and renamed"
    began = time.monotonic()
    with _folder(settings) as folder:
        final, aside = folder / "final", folder / "aside"
        try:
            for number in range(RENAMES):
                _write(aside, f"{number}\n".encode())
                os.replace(aside, final)
                if final.read_bytes() != f"{number}\n".encode():
                    yield fault("a renamed file has its old content", remedy)
                    return
            (folder / "new").mkdir()
            _write(folder / "new" / "file", b"content")
            os.rename(folder / "new", folder / "published")
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            whole = (folder / "published" / "file").read_bytes() == b"content"
        except OSError as error:
            yield fault(f"rename or fsync fails in {settings.directory} ({error.strerror})", remedy)
            return
    if not whole:
        yield fault("a renamed directory has lost its content", remedy)
        return
    each = 1000 * (time.monotonic() - began) / RENAMES
    yield ok(f"renames replace files at once, fsync works ({each:.1f} ms for a small file)")


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_speed(settings: Settings) -> Iterator[Finding]:
    """Measure how fast a large file is written and read again, and the space that is left."""
    free = shutil.disk_usage(settings.directory).free
    if free < LITTLE_GB * GB:
        yield warning(
            f"{settings.directory} has {free / GB:.1f} GB free",
            "a checkpoint takes 12 to 16 bytes a parameter: 16 GB for each billion; choose "
            "another place, or checkpoint.keep: 1",
        )
    size = int(min(MOST_BYTES, free * MOST_OF_FREE)) // PIECE * PIECE
    if size < PIECE:
        yield warning("too little space to measure the speed", "make room")
        return
    piece = os.urandom(PIECE)
    with _folder(settings) as folder:
        path = folder / "large"
        written, seconds = 0, 0.0
        began = time.monotonic()
        with open(path, "wb", buffering=0) as file:
            while written < size and time.monotonic() - began < MOST_SECONDS:
                written += file.write(piece)
                if written % SYNCED == 0:
                    os.fsync(file.fileno())
            os.fsync(file.fileno())
            # So that the file is read from the disk and not from memory, where that is possible.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        seconds = time.monotonic() - began
        read, began = 0, time.monotonic()
        with open(path, "rb", buffering=0) as file:
            while time.monotonic() - began < MOST_SECONDS and (found := file.read(PIECE)):
                read += len(found)
        reading = time.monotonic() - began
    write_speed, read_speed = written / seconds / MB, read / reading / MB
    text = (
        f"writes {write_speed:,.0f} MB/s, reads {read_speed:,.0f} MB/s, one process, "
        f"{written / MB:,.0f} MB; {free / GB:,.0f} GB free"
    )
    if write_speed < SLOW_MB_PER_S:
        minutes = 16 * GB / MB / write_speed / 60
        yield warning(
            f"{text}: a checkpoint of a billion parameters takes {minutes:.0f} minutes",
            "choose a faster file system for `output`, or save less often (checkpoint.every_steps)",
        )
    else:
        yield ok(text)


def check_clock(settings: Settings) -> Iterator[Finding]:
    """Compare this machine's clock with the one that stamps files."""
    with _folder(settings) as folder:
        before = time.time()
        path = folder / "stamp"
        path.write_bytes(b"\n")
        after = time.time()
        stamp = path.stat().st_mtime
    # A stamp may be rounded down to the clock's tick, or to a whole second.
    ahead = max(before - 1.0 - stamp, 0.0) or -max(stamp - after, 0.0)
    remedy = "synchronize the clocks of nodes and file server (chrony or ntpd)"
    text = f"this clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of files"
    if abs(ahead) > WORST_SKEW:
        yield fault(text, remedy)
    elif abs(ahead) > LARGEST_SKEW:
        yield warning(text, remedy)
    else:
        yield ok(f"this clock agrees with that of files in {settings.directory}")
