"""How many files this process may have open."""

from __future__ import annotations

import resource
from contextlib import suppress

_ENOUGH = 1 << 16


def allow_many_open_files() -> None:
    """Raise the limit of open files as far as this user may; a portable checkpoint has a file for
    every parameter, and 1,024 is a usual limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
