"""A folder that one process builds while the others wait, and that is built again if damaged.

Its `index.json` contains the hashes of all pieces of its other files. A small folder is verified
whole whenever it is opened, of a large one each piece when it is first read, see verified_file.py.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from megaphase.plan.hashed_chunks import PIECE_BYTES, pieces_damage
from megaphase.plan.verified_file import ALTERED_FILE, VerifiedFile
from megaphase.utils.errors import RunError
from megaphase.utils.files import (
    make_directory,
    read_json,
    remove_abandoned,
    remove_soon,
    without_hash,
)
from megaphase.utils.locks import exclusive_lock
from megaphase.utils.set_aside import make_way_for_directory, set_aside

INDEX_FILE = "index.json"

# Folders up to this size are verified whole.
SMALL_BYTES = 64 << 20

Say = Callable[[str], object]
# Removes the partial output if the build is interrupted or fails.
Discard = Callable[[Path], object]


def ensure_folder(
    folder: Path,
    damage: Callable[[Path], str | None],
    build: Callable[[Path, Discard], object],
    own_files: re.Pattern[str],
    say: Say,
) -> None:
    """Build a folder in a run's directory of plans unless a valid one exists.

    Args:
        damage: returns why a folder cannot be used, or None.
        build: publishes the folder.
        own_files: the names of the files that `build` writes; a folder with others is set aside.
        say: called with sentences for the user.

    Raises:
        RunError: the disk cannot be written.
        Others that `build` raises.
    """
    if folder.is_dir() and damage(folder) is None:
        return
    with _os_errors_named(folder):
        make_way_for_directory(folder.parent, "the directory of plans", say)
    run_dir = folder.parent.parent
    with _new_directories(folder.parent, run_dir) as new, _os_errors_named(folder):
        waiting = partial(say, f"{folder}: another process is building this plan; waiting for it")
        with exclusive_lock(folder.with_name(f".{folder.name}.lock"), waiting):
            make_way_for_directory(folder, "the index of a plan", say)
            if folder.exists():
                problem = damage(folder)
                if problem is None:
                    return
                _remove_damaged(folder, problem, own_files, say)
            remove_abandoned(folder)
            try:
                build(folder, partial(remove_soon, then_if_empty=new))
            except OSError as error:
                # On a file system without locks, another process may have published it meanwhile.
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or damage(folder) is not None:
                    raise


def read_header(folder: Path) -> dict[str, Any]:
    """Return the content of `index.json`.

    Raises ValueError if it was altered, FileNotFoundError if it does not exist.
    """
    header = read_json(folder / INDEX_FILE)
    if not isinstance(header, dict):
        raise ValueError(f"{INDEX_FILE} is not a JSON object")
    return without_hash(header)


def stored_damage(
    folder: Path, version: int, fingerprint: str, what: str, threads: int, *, whole: bool = False
) -> str | None:
    """Return why a built folder cannot be used, or None if nothing is known against it.

    version, fingerprint: those that its header must have. what: `plan` or `table`, for the message.
    whole: whether to verify every byte also of a large folder.
    """
    try:
        header = read_header(folder)
    except FileNotFoundError:
        return f"{INDEX_FILE} is missing"
    except (OSError, ValueError):
        return f"{INDEX_FILE} has been altered"
    if (header.get("format"), header.get("fingerprint")) != (version, fingerprint):
        return f"{INDEX_FILE} belongs to another {what}"
    altered = folder / ALTERED_FILE
    if altered.is_file():
        return f"{altered.read_text()} has been altered"
    whole = whole or is_verified_whole(header)
    for name, file in header["files"].items():
        pieces = file["pieces"] if whole else []
        if fault := pieces_damage(folder / name, file["bytes"], pieces, threads):
            return f"{name} {fault}"
    return None


def is_verified_whole(header: dict[str, Any]) -> bool:
    """Return whether a folder with this header is verified whole whenever it is opened: if it is
    small, or of an earlier version, whose pieces are too large to be verified during training."""
    files = header["files"].values()
    largest = max((size for file in files for _, size, _ in file["pieces"]), default=0)
    return sum(file["bytes"] for file in files) <= SMALL_BYTES or largest > PIECE_BYTES


def open_files(folder: Path, header: dict[str, Any]) -> dict[str, VerifiedFile]:
    """Return the files of a folder that `stored_damage` has found usable, by name."""
    verified = is_verified_whole(header)
    return {
        name: VerifiedFile(folder / name, described, verified=verified)
        for name, described in header["files"].items()
    }


def _remove_damaged(folder: Path, problem: str, own_files: re.Pattern[str], say: Say) -> None:
    if folder.is_symlink() or any(not own_files.fullmatch(p.name) for p in folder.iterdir()):
        set_aside(folder, "the index of a plan", say)
    else:
        say(f"{folder}: {problem}; building the plan again")
        shutil.rmtree(folder)


@contextmanager
def _new_directories(*directories: Path) -> Iterator[list[Path]]:
    """Create the directories; at the end, remove those that were created and are empty."""
    new = [each for each in directories if not each.exists()]
    make_directory(directories[0])
    try:
        yield new
    finally:
        for each in new:
            with suppress(OSError):
                each.rmdir()


@contextmanager
def _os_errors_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder}: the plan could not be written ({error.strerror})") from error
