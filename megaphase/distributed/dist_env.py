"""The launcher's (torchrun, srun, `megaphase launch`) information about the processes it started,
and the processes' reports to `megaphase launch local`.

Only this module reads the launcher's environment variables. It does not import torch, so that a
command can use it before it imports anything heavy.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence

from megaphase.utils.errors import InputError

# File descriptor of a pipe to `megaphase launch local`, which observes how a process ends.
REPORTS_VARIABLE = "MEGAPHASE_REPORTS"
MOST_PROCESSES = 10_000_000
_HIGHEST_PORT = 65_535
_REMEDY = "start it with torchrun, srun or megaphase launch, or unset the variable"


def world_size() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher."""
    return _number("WORLD_SIZE", 1, least=1)


def given_world_size() -> int | None:
    """Like `world_size`, but None without a launcher."""
    return world_size() if _is_set("WORLD_SIZE") else None


def global_rank() -> int:
    """Return this process's rank among all processes."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Return this process's rank among those of its node."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return the number of processes on this node; 1 if the launcher does not provide it."""
    return _number("LOCAL_WORLD_SIZE", 1, least=1)


def share_of_node() -> tuple[int, int]:
    """Return this process's rank among those of its node, and their number; (0, 1) if the launcher
    does not provide them."""
    processes = local_world_size()
    return (local_rank(), processes) if processes > 1 else (0, 1)


def check_launch() -> None:
    """Reject inconsistent variables.

    Raises:
        InputError: names the variable.
    """
    _check_rank("RANK", global_rank(), "WORLD_SIZE", world_size())
    if _is_set("LOCAL_WORLD_SIZE"):
        _check_rank("LOCAL_RANK", local_rank(), "LOCAL_WORLD_SIZE", local_world_size())
    local_rank()
    _number("MASTER_PORT", 1, least=1, most=_HIGHEST_PORT)


def check_rendezvous() -> None:
    """Reject several processes that do not know where to find each other.

    Raises:
        InputError: names the missing variable.
    """
    check_launch()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if world_size() > 1 and not _is_set(name):
            raise InputError(
                name, f"is not set, but WORLD_SIZE is {world_size():,}", "set it, or use a launcher"
            )


def is_first_rank() -> bool:
    """Return whether this process reports for all; true if the variables are inconsistent."""
    try:
        check_launch()
    except InputError:
        return True
    return global_rank() == 0


def is_launched_locally() -> bool:
    """Return whether `megaphase launch local` has started and supervises this process."""
    return REPORTS_VARIABLE in os.environ


def report_end(rank: int | None, lines: Sequence[str]) -> bool:
    """Let `megaphase launch local` report why the job ends; return False if it is not the launcher.

    rank: the rank that caused the end, if there is one.
    """
    descriptor = os.environ.get(REPORTS_VARIABLE)
    if descriptor is None:
        return False
    report = json.dumps({"rank": rank, "lines": list(lines)}) + "\n"
    with contextlib.suppress(OSError, ValueError):
        os.write(int(descriptor), report.encode())
        return True
    return False


def _check_rank(name: str, rank: int, of: str, processes: int) -> None:
    if rank >= processes:
        raise InputError(name, f"is {rank:,}, but {of} is {processes:,}", _REMEDY)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "") != ""


def _number(name: str, default: int, *, least: int = 0, most: int = MOST_PROCESSES) -> int:
    if not _is_set(name):
        return default
    text = os.environ[name]
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1
    if not least <= number <= most:
        raise InputError(
            name, f"is {text[:40]!r}, not a whole number from {least} to {most:,}", _REMEDY
        )
    return number
