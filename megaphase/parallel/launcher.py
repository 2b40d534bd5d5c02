"""What the launcher (torchrun, srun, `megaphase launch`) says about the processes it started.

Without torch, so that a command can ask before it imports anything heavy.
"""

from __future__ import annotations

import os


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def global_rank() -> int:
    """This process's number among all that the launcher started."""
    return int(os.environ.get("RANK", "0"))
