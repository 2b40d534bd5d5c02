"""What the launcher (torchrun, srun, `megaphase launch`) says about the processes it started, and
what they tell `megaphase launch local`.

The one place that reads its environment variables, without torch, so that a command can ask before
it imports anything heavy.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence

from megaphase.utils.errors import InputError

# The descriptor of a pipe to `megaphase launch local`, which sees how a process has ended.
REPORTS_VARIABLE = "MEGAPHASE_REPORTS"
MOST_PROCESSES = 10_000_000
_HIGHEST_PORT = 65_535
_REMEDY = "start it with torchrun, srun or megaphase launch, or unset the variable"


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return _number("WORLD_SIZE", 1, least=1)


def given_world_size() -> int | None:
    """The same; None without a launcher."""
    return world_size() if _is_set("WORLD_SIZE") else None


def global_rank() -> int:
    """This process's number among all that the launcher started."""
    return _number("RANK", 0)


def local_rank() -> int:
    """This process's number among those of its node."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Number of processes on this node; 1 without a launcher that says it."""
    return _number("LOCAL_WORLD_SIZE", 1, least=1)


def share_of_node() -> tuple[int, int]:
    """This process's number among those of its node, and how many they are; (0, 1) where the
    launcher does not say it."""
    processes = local_world_size()
    return (local_rank(), processes) if processes > 1 else (0, 1)


def check_launch() -> None:
    """Refuse what cannot be true of any launch.

    Raises:
        InputError: naming the variable.
    """
    _check_rank("RANK", global_rank(), "WORLD_SIZE", world_size())
    if _is_set("LOCAL_WORLD_SIZE"):
        _check_rank("LOCAL_RANK", local_rank(), "LOCAL_WORLD_SIZE", local_world_size())
    local_rank()
    _number("MASTER_PORT", 1, least=1, most=_HIGHEST_PORT)


def check_meeting() -> None:
    """Refuse several processes that are not told where to find each other.

    Raises:
        InputError: naming the variable that is missing.
    """
    check_launch()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if world_size() > 1 and not _is_set(name):
            raise InputError(
                name, f"is not set, but WORLD_SIZE is {world_size():,}", "set it, or use a launcher"
            )


def is_first_rank() -> bool:
    """Whether this process speaks for all; so does one whose launch cannot be true."""
    try:
        check_launch()
    except InputError:
        return True
    return global_rank() == 0


def is_launched_locally() -> bool:
    """Whether `megaphase launch local` has started this process and looks after it."""
    return REPORTS_VARIABLE in os.environ


def report_end(rank: int | None, lines: Sequence[str]) -> bool:
    """Let `megaphase launch local` say why the job ends; False where it has not started this one.

    rank: the one at fault, where there is one.
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
