"""The control groups around this process, whose limits are those of a container or a batch job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

_OWN_CGROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def own_cgroups(controller: Literal["cpu", "memory"]) -> Iterator[tuple[Path, Literal[1, 2]]]:
    """Yield the folder and the version of every cgroup around this process that this controller
    may limit, from the innermost outwards.

    In a container the folders that /proc names may be missing; the outermost one is the container's
    own then. Source: cgroups(7).
    """
    try:
        lines = [line.split(":", 2) for line in _OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, name in lines:
        if not controllers:
            yield from ((folder, 2) for folder in _outwards(_MOUNT, name))
        elif controller in controllers.split(","):
            yield from ((folder, 1) for folder in _outwards(_MOUNT / controller, name))


def _outwards(mount: Path, name: str) -> Iterator[Path]:
    folder = mount / name.lstrip("/")
    yield folder
    while folder != mount:
        folder = folder.parent
        yield folder
