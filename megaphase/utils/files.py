"""Write outputs atomically: write to a temporary path, fsync, rename."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from megaphase.utils.errors import NO_SPACE, InputError, RunError, file_fault
from megaphase.utils.set_aside import remove_leftover

HASH_CHUNK_BYTES = 1 << 22

# Temporary output of another machine without changes for this long is considered abandoned.
_ABANDONED_SECONDS = 600.0

REMOVAL_SECONDS = 0.4


def new_hash() -> Any:
    """Return an XXH3-128 hash, the digest of files: it finds damage, at memory speed."""
    return xxhash.xxh3_128()


def hash_file(
    path: Path,
    offset: int = 0,
    size: int | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> str:
    """Return the hex digest of a file, or of `size` bytes from `offset` on, read in chunks.

    advance: called with the number of bytes of every chunk.
    """
    digest = new_hash()
    left = path.stat().st_size - offset if size is None else size
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while left > 0 and (chunk := file.read(min(left, HASH_CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
            advance(len(chunk))
    return str(digest.hexdigest())


def read_file(path: Path, *, pipes: bool = False) -> bytes:
    """Return all bytes of a regular file; never block on a FIFO or device at that path.

    pipes: whether to read pipes too, such as a shell's `<(command)`. A FIFO without a writer is
        empty.

    Raises OSError with the file's name, also if it is not a file of these kinds.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not (stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode))):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        os.set_blocking(descriptor, True)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        error.filename = str(path)  # otherwise it is the descriptor's number, or missing
        raise
    finally:
        os.close(descriptor)


def last_lines(path: Path, most_bytes: int = 1 << 16) -> list[str]:
    """Return the last lines of a text that may be long; blank ones are left out.

    most_bytes: only so many at the end are read. The first line may have lost its beginning.
    """
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - most_bytes))
        text = file.read(most_bytes).decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; raise OSError as `read_file`, ValueError if it is not
    JSON."""
    try:
        return json.loads(read_file(path))
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def real_path(path: Path) -> Path:
    """Return the absolute path without links; unlike Path.resolve, keep a loop of links."""
    return Path(os.path.realpath(path))


def describe_file(path: Path) -> dict[str, Any]:
    """Return the description of a file for a manifest: its `bytes` and its `hash`."""
    return {"bytes": path.stat().st_size, "hash": hash_file(path)}


def file_damage(
    path: Path,
    described: dict[str, Any],
    advance: Callable[[int], object] = lambda count: None,
) -> str | None:
    """Return how a file differs from its `describe_file`, or None; compares the size first.

    advance: see `hash_file`. Raises KeyError or TypeError if `described` is not a description.
    """
    if damage := size_damage(path, described["bytes"]):
        return damage
    return None if hash_file(path, advance=advance) == described["hash"] else "has been altered"


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder and its subfolders."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size_damage(path: Path, expected: int) -> str | None:
    """Return why a file cannot be the one that had `expected` bytes, or None."""
    if not path.is_file():
        return "is not a regular file" if os.path.lexists(path) else "is missing"
    size = path.stat().st_size
    return None if size == expected else f"has {size} bytes, not {expected}"


def hash_json(value: Any) -> str:
    """Return the hex BLAKE2b digest of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class AlteredError(ValueError):
    """A JSON object differs from the one that was written."""


def with_hash(value: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the digest of its content added as `hash`."""
    return value | {"hash": hash_json(value)}


def without_hash(value: dict[str, Any]) -> dict[str, Any]:
    """Return the argument of `with_hash`; raise AlteredError if it was altered or has no hash."""
    rest = {key: each for key, each in value.items() if key != "hash"}
    if value.get("hash") != hash_json(rest):
        raise AlteredError("the hash is that of another object")
    return rest


def read_hashed_json(path: Path) -> Any:
    """Return an object that was written with `with_hash`; files of an earlier version have no hash.

    Raises OSError as `read_file`, and ValueError if it is not JSON or has been altered.
    """
    value = read_json(path)
    return without_hash(value) if isinstance(value, dict) and "hash" in value else value


def fsync_path(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of the content; a single `os.write` may write less."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def temporary_path(final: Path) -> Path:
    """Return the path at which this process writes the content of `final`, before renaming it."""
    return final.with_name(f".{final.name}.{socket.gethostname()}-{os.getpid()}.partial")


def remove_abandoned(final: Path) -> None:
    """Remove the temporary directories of `final` that killed processes left behind."""
    for aside in final.parent.glob(f".{glob.escape(final.name)}.*.partial"):
        if _is_abandoned(aside):
            remove_directory(aside)


def _is_abandoned(aside: Path) -> bool:
    host, _, process = aside.name.removesuffix(".partial").rpartition("-")
    if host.endswith(f".{socket.gethostname()}") and process.isdecimal():
        return not Path("/proc", process).exists()
    with suppress(OSError):
        newest = max(path.stat().st_mtime for path in (aside, *aside.rglob("*")))
        return time.time() - newest > _ABANDONED_SECONDS
    return False


def atomic_write_text(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old or the new content, never a part."""
    aside = temporary_path(path)
    try:
        with _named(aside, path):
            with open(aside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write an indented JSON value with `atomic_write_text`."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_place(path: Path) -> None:
    """Reject a file that cannot be written, before hours are spent on its content."""
    if path.is_dir():
        raise InputError(path, "is a folder", "name a file")
    if path.exists() and not path.is_file():  # it would be replaced, even /dev/null
        raise InputError(path, "is not a regular file", "name a file")
    make_directory(path.absolute().parent)


def publish_directory(aside: Path, final: Path) -> None:
    """Rename a temporary directory to its final name."""
    for path in sorted(aside.rglob("*")):
        fsync_path(path)
    fsync_path(aside)
    os.rename(aside, final)
    fsync_path(final.parent)


def make_directory(path: Path) -> None:
    """Create a directory and its parents; raise InputError if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "choose another place for the output"
        raise file_fault(path, error, remedy, "cannot be created") from None


def remove_directory(directory: Path) -> None:
    """Remove a directory with all of its content; errors are ignored."""
    shutil.rmtree(directory, ignore_errors=True)


def removal_path(directory: Path) -> Path:
    """Return the path to which a directory is renamed before it is removed."""
    return directory.with_name(f".{directory.name}.removed")


def remove_directory_at_once(directory: Path) -> None:
    """Rename a directory before removing it, so that no part of it is ever taken for the whole;
    also remove what a killed call of this function left behind.
    """
    doomed = removal_path(directory)
    remove_leftover(doomed)
    if directory.is_dir() and not directory.is_symlink():
        os.rename(directory, doomed)
        remove_directory(doomed)


def remove_soon(directory: Path, then_if_empty: Sequence[Path] = ()) -> None:
    """Remove a directory, then those of `then_if_empty` that are empty, without a long wait.

    A disk that discards blocks takes over a second per gigabyte. What is not removed after
    REMOVAL_SECONDS is left to a process that continues when this one has ended.
    """
    script = 'rm -rf -- "$1"; shift; [ $# = 0 ] || rmdir -- "$@"'
    process = subprocess.Popen(
        ["sh", "-c", script, "sh", directory, *then_if_empty],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with suppress(subprocess.TimeoutExpired):
        process.wait(REMOVAL_SECONDS)


@contextmanager
def directory_written_aside(
    final: Path, discard: Callable[[Path], object] = remove_directory
) -> Iterator[Path]:
    """Yield a temporary directory next to `final`; rename it when the block ends without an error.

    Otherwise `discard` removes it.
    """
    aside = temporary_path(final)
    remove_leftover(aside)
    make_directory(aside)
    try:
        with _named(aside, final):
            yield aside
            publish_directory(aside, final)
    except BaseException:
        discard(aside)
        raise


@contextmanager
def _named(aside: Path, final: Path) -> Iterator[None]:
    """Make system errors name the final path instead of the temporary one."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        if name is None and error.errno in NO_SPACE:  # a failed write does not name the file
            error.filename = str(final)
        elif name is not None and name.startswith(str(aside)):
            error.filename = f"{final}{name.removeprefix(str(aside))}"
        raise


@contextmanager
def os_errors_named(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a RunError that names the path."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from error
