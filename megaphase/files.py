"""Outputs appear whole or not at all: write aside, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaphase.errors import InputError

HASH_CHUNK_BYTES = 1 << 22


def new_hash() -> Any:
    """BLAKE2b with 128 bits: the digest of every file and fingerprint of this project."""
    return hashlib.blake2b(digest_size=16)


def hash_file(path: Path) -> str:
    """Hexadecimal digest of a file's bytes, read in chunks."""
    digest = new_hash()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its `bytes` and its `hash`."""
    return {"bytes": path.stat().st_size, "hash": hash_file(path)}


def file_damage(path: Path, described: dict[str, Any]) -> str | None:
    """How a file differs from what `describe_file` said of it, or None; the size is compared first.

    Raises KeyError or TypeError where `described` is no such description.
    """
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != described["bytes"]:
        return f"has {size} bytes, not {described['bytes']}"
    return None if hash_file(path) == described["hash"] else "has been altered"


def hash_json(value: Any) -> str:
    """Hexadecimal digest of a JSON value, independent of the order of its keys."""
    digest = new_hash()
    digest.update(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_whole(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old or the new content, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_json_whole(path: Path, value: Any) -> None:
    """`write_text_whole` of an indented JSON value."""
    write_text_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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


@contextmanager
def directory_written_aside(final: Path) -> Iterator[Path]:
    """Yield a scratch directory beside `final`; publish it when the block ends without error."""
    aside = final.with_name(f".{final.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    make_directory(aside)
    try:
        yield aside
        publish_directory(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
