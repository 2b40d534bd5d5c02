"""The CPU cores that a process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

from megaphase.utils.cgroups import own_cgroups


def available_cores() -> int:
    """Return the number of cores that this process may use, at least 1: those that it may run on,
    or fewer if a cgroup, such as that of a container, limits its time on them."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min([cores, *_limits()])


def _limits() -> Iterator[int]:
    """The limits of CPU time of the cgroups around this process, in cores, rounded up."""
    for folder, version in own_cgroups("cpu"):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            microseconds = int(quota)
            if microseconds > 0:
                yield -(-microseconds // int(period))
        except (OSError, ValueError):  # no such limit: `max`
            continue
