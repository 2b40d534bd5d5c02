"""What the launcher (torchrun, srun, `megaphase launch`) says about the processes it started, and
what they tell `megaphase launch local`.

Without torch, so that a command can ask before it imports anything heavy.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence

# The descriptor of a pipe to `megaphase launch local`, which sees how a process has ended.
REPORTS_VARIABLE = "MEGAPHASE_REPORTS"


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def global_rank() -> int:
    """This process's number among all that the launcher started."""
    return int(os.environ.get("RANK", "0"))


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
