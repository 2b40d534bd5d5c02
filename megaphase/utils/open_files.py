"""How many files this process may have open."""

from __future__ import annotations

import resource
from contextlib import suppress

_ENOUGH = 1 << 16


def allow_many_open_files(least: int = 0) -> None:
    """Raise the limit of open files as far as this user may: a checkpoint has a file for every
    process or parameter, a tokenization thousands of shards, and 1,024 is a usual limit.

    least: how many are wanted beside those of any command.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH + least if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH + least)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
