"""Outputs appear whole or not at all: write aside, fsync, rename."""

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

from megaphase.utils.errors import NO_SPACE, InputError, RunError
from megaphase.utils.set_aside import remove_leftover

HASH_CHUNK_BYTES = 1 << 22

# After so long without a change, what another machine wrote aside is taken for abandoned.
_ABANDONED_SECONDS = 600.0

REMOVAL_SECONDS = 0.4


def new_hash() -> Any:
    """XXH3 with 128 bits: the digest of files. It finds damage, at the speed of the memory."""
    return xxhash.xxh3_128()


def hash_file(
    path: Path,
    offset: int = 0,
    size: int | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> str:
    """Hexadecimal digest of a file's bytes, or of `size` of them from `offset` on, in chunks.

    advance: is called with the number of bytes of every chunk.
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
    """All bytes of a regular file; a FIFO or a device that lies there never makes this wait.

    pipes: whether a pipe is read, too, as `<(command)` of a shell is one. A FIFO into which nobody
        writes is empty.

    Raises OSError, with the file's name, also where it is no such file.
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
        error.filename = str(path)  # the number of the descriptor, or nothing
        raise
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """The value in a JSON file; OSError as of `read_file`, ValueError where it is no JSON."""
    try:
        return json.loads(read_file(path))
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def real_path(path: Path) -> Path:
    """The absolute path without links; unlike Path.resolve it takes a loop of links as it is."""
    return Path(os.path.realpath(path))


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its `bytes` and its `hash`."""
    return {"bytes": path.stat().st_size, "hash": hash_file(path)}


def file_damage(
    path: Path,
    described: dict[str, Any],
    advance: Callable[[int], object] = lambda count: None,
) -> str | None:
    """How a file differs from what `describe_file` said of it, or None; the size is compared first.

    advance: see `hash_file`. Raises KeyError or TypeError where `described` is no such description.
    """
    if damage := size_damage(path, described["bytes"]):
        return damage
    return None if hash_file(path, advance=advance) == described["hash"] else "has been altered"


def folder_bytes(folder: Path) -> int:
    """Of all files in a folder and those below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size_damage(path: Path, expected: int) -> str | None:
    """Why a file cannot be the one that had so many bytes, or None."""
    if not path.is_file():
        return "is not a regular file" if os.path.lexists(path) else "is missing"
    size = path.stat().st_size
    return None if size == expected else f"has {size} bytes, not {expected}"


def hash_json(value: Any) -> str:
    """Hexadecimal BLAKE2b digest of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class AlteredError(ValueError):
    """A JSON object is not the one that was written."""


def with_hash(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of all else in it as `hash`."""
    return value | {"hash": hash_json(value)}


def without_hash(value: dict[str, Any]) -> dict[str, Any]:
    """What was given to `with_hash`; AlteredError where it is another one, or has no hash."""
    rest = {key: each for key, each in value.items() if key != "hash"}
    if value.get("hash") != hash_json(rest):
        raise AlteredError("the hash is that of another object")
    return rest


def read_hashed_json(path: Path) -> Any:
    """What was given to `with_hash` and written; files of an earlier version have no hash.

    Raises OSError as `read_file` does, ValueError where it is no JSON or has been altered.
    """
    value = read_json(path)
    return without_hash(value) if isinstance(value, dict) and "hash" in value else value


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of it, where a single `os.write` may write less."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def temporary_path(final: Path) -> Path:
    """Where this process writes what is to appear as `final`."""
    return final.with_name(f".{final.name}.{socket.gethostname()}-{os.getpid()}.partial")


def remove_abandoned(final: Path) -> None:
    """Remove the directories in which processes that were killed wrote what was to be `final`."""
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
    """`atomic_write_text` of an indented JSON value."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def publish_directory(aside: Path, final: Path) -> None:
    """Make a directory written aside appear under its final name, in one rename."""
    for path in sorted(aside.rglob("*")):
        fsync_path(path)
    fsync_path(aside)
    os.rename(aside, final)
    fsync_path(final.parent)


def make_directory(path: Path) -> None:
    """Create a directory and those above it; InputError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be created ({error.strerror})"
        raise InputError(path, problem, "choose another place for the output") from None


def remove_directory(directory: Path) -> None:
    """Remove a directory with all that is in it; errors are ignored."""
    shutil.rmtree(directory, ignore_errors=True)


def removal_path(directory: Path) -> Path:
    """Where a directory is while it is removed."""
    return directory.with_name(f".{directory.name}.removed")


def remove_directory_at_once(directory: Path) -> None:
    """Remove a directory, so that no part of it is ever taken for all; what a killed call of this
    has left behind goes, too.
    """
    doomed = removal_path(directory)
    remove_leftover(doomed)
    if directory.is_dir() and not directory.is_symlink():
        os.rename(directory, doomed)
        remove_directory(doomed)


def remove_soon(directory: Path, then_if_empty: Sequence[Path] = ()) -> None:
    """Remove a directory, then those of the others that are empty, without waiting for long.

    A disk that discards blocks takes over a second for a gigabyte; what is not done after
    REMOVAL_SECONDS is left to a process that goes on when this one has ended.
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
    """Yield a scratch directory beside `final`; publish it when the block ends without error.

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
    """Let errors of the system name what was to be written, not where it is written aside."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        if name is None and error.errno in NO_SPACE:  # a write does not know the file's name
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
