"""Heartbeats: what a rank reports about itself and about a neighbouring process on its node."""

from __future__ import annotations

import json
import os
import socket
import sysconfig
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import megaphase
from megaphase.distributed.lost_connection import is_collective
from megaphase.fault_tolerance.stack_dump import Frame, all_stacks

State = Literal["running", "patient", "broken", "fault", "failed", "interrupted", "left"]

# A message names the innermost frame outside of libraries. This package may be among them.
_OWN = str(Path(megaphase.__file__).parent) + os.sep
_LIBRARIES = (
    "<",
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)
_BACKWARD = f"torch{os.sep}autograd{os.sep}"


@dataclass(frozen=True)
class RankInfo:
    """Where a rank runs. `born` is the start time of its process in clock ticks of its machine."""

    host: str
    pid: int
    born: int | None

    @classmethod
    def here(cls) -> RankInfo:
        seen = find_process(os.getpid())
        return cls(socket.gethostname(), os.getpid(), seen.born if seen else None)


class Heartbeat(NamedTuple):
    """A rank's report, about once a second. A tuple, since rank 0 parses one of every rank.

    counter: incremented by every heartbeat. progress: number of times the main thread has reported
    its position. where: the last reported position, such as `in step 12`. code: the position of the
    main thread in the program. waits: whether it is in a collective, so that it waits for other
    ranks. neighbour: CPU ticks used by the next rank on the same node; -1 if its process is gone,
    None if it cannot be seen.

    state: `patient`: the main thread is busy for long without making progress; `broken`: a
    collective has failed; `fault` and `failed`: the rank leaves with an expected and an unexpected
    error; `interrupted`: it leaves on a signal before there is anything to save; `left`: it is
    done.
    reason: the error, or the name of the signal.
    """

    counter: int
    progress: int
    where: str
    code: str = ""
    waits: bool = False
    neighbour: int | None = None
    state: State = "running"
    reason: str = ""
    exit_code: int = 1

    def to_json(self) -> str:
        return json.dumps(self)

    @classmethod
    def from_json(cls, data: bytes) -> Heartbeat:
        return cls(*json.loads(data.decode()))


@dataclass(frozen=True)
class SeenProcess:
    """A process as seen by its machine: its start time and the CPU time it has used, in ticks."""

    born: int
    cpu_ticks: int


def find_process(pid: int) -> SeenProcess | None:
    """Return a process of this machine, or None if it has ended or is not visible."""
    try:
        # The name in the second field may contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZXx":
            return None
        return SeenProcess(born=int(fields[19]), cpu_ticks=int(fields[11]) + int(fields[12]))
    except (OSError, ValueError, IndexError):
        return None


class Neighbour:
    """The next rank on the same node, observed even if it holds Python's global lock for long.

    Nothing is reported about it if the machine hides its process (another container or system), or
    if there is none.
    """

    def __init__(self, rank: int, places: Sequence[RankInfo]) -> None:
        following = next_on_node(places)[rank]
        self._place = places[following]
        self._visible = following != rank and self._see() is not None

    def ticks(self) -> int | None:
        """Return the CPU ticks that it has used, -1 if it is gone, None if it cannot be seen."""
        if not self._visible:
            return None
        seen = self._see()
        return -1 if seen is None else seen.cpu_ticks

    def _see(self) -> SeenProcess | None:
        # The same id with another start time is another process, e.g. in another container.
        seen = find_process(self._place.pid)
        return seen if seen is not None and seen.born == self._place.born else None


def next_on_node(places: Sequence[RankInfo]) -> list[int]:
    """Return, for every rank, the next one on the same host, cyclically; itself if it is alone."""
    by_host: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        by_host.setdefault(place.host, []).append(rank)
    following = list(range(len(places)))
    for ranks in by_host.values():
        for rank, after in zip(ranks, [*ranks[1:], ranks[0]], strict=True):
            following[rank] = after
    return following


def thread_position(thread: int) -> tuple[str, bool]:
    """Return a thread's position (`loop.py:12 in run`), and whether it is in a collective."""
    stacks = all_stacks()
    stack = stacks.get(thread, [])
    waits = _in_collective(stack)
    if not waits and stack and _BACKWARD in stack[0].filename:
        # On a GPU the backward pass, with its collectives, runs in its own threads.
        apart = (thread, threading.get_ident())
        waits = any(_in_collective(each) for ident, each in stacks.items() if ident not in apart)
    own = next((frame for frame in stack if not _is_library(frame)), None)
    return _describe(own) if own else "", waits


def _in_collective(stack: Sequence[Frame]) -> bool:
    return any(is_collective(frame.filename) for frame in stack)


def _is_library(frame: Frame) -> bool:
    return frame.filename.startswith(_LIBRARIES) and not frame.filename.startswith(_OWN)


def _describe(frame: Frame) -> str:
    return f"{os.path.basename(frame.filename)}:{frame.line} in {frame.function}"
