"""Signs of life: what a rank tells of itself, and what a neighbour on its node sees of it."""

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

# A message names the last place outside of libraries. This package may be installed among them.
_OWN = str(Path(megaphase.__file__).parent) + os.sep
_LIBRARIES = (
    "<",
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)
_BACKWARD = f"torch{os.sep}autograd{os.sep}"


@dataclass(frozen=True)
class RankInfo:
    """Where a rank runs. `born` is when its process began, in the clock ticks of its machine."""

    host: str
    pid: int
    born: int | None

    @classmethod
    def here(cls) -> RankInfo:
        seen = look_at_process(os.getpid())
        return cls(socket.gethostname(), os.getpid(), seen.born if seen else None)


class Heartbeat(NamedTuple):
    """What a rank tells about once a second. A tuple, since rank 0 reads one of every rank.

    counter: grows with every beat. progress: how often its main thread has said where it is.
    where: what it said last, such as `in step 12`. code: where in the program its main thread is.
    waits: whether that is in a collective, so that other ranks are what it waits for.
    neighbour: CPU ticks that the next rank on the same node has used; -1 where its process is
    gone, None where it cannot be seen.

    state: `patient` announces that the main thread is busy for long and makes no progress; `broken`
    has seen a collective fail; `fault` and `failed` leave with an error, the one foreseen and the
    other not; `interrupted` leaves on a signal before there is anything to save; `left` is done.
    reason: the error, or which signal it was.
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
    """A process as its machine sees it: when it began, and the CPU time it has used, in ticks."""

    born: int
    cpu_ticks: int


def look_at_process(pid: int) -> SeenProcess | None:
    """A process of this machine; None where it has ended or this machine does not show it."""
    try:
        # The name in the second field may hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZXx":
            return None
        return SeenProcess(born=int(fields[19]), cpu_ticks=int(fields[11]) + int(fields[12]))
    except (OSError, ValueError, IndexError):
        return None


class Neighbour:
    """The next rank on the same node. It is seen even if it holds Python's lock for long.

    Where the machine hides its process (a container of its own, another system), or where there
    is none, nothing is ever said of it.
    """

    def __init__(self, rank: int, places: Sequence[RankInfo]) -> None:
        following = next_on_node(places)[rank]
        self._place = places[following]
        self._visible = following != rank and self._see() is not None

    def ticks(self) -> int | None:
        """CPU ticks that it has used, -1 if it is gone, None if it cannot be seen."""
        if not self._visible:
            return None
        seen = self._see()
        return -1 if seen is None else seen.cpu_ticks

    def _see(self) -> SeenProcess | None:
        # The same number with another start is another process, as in another container.
        seen = look_at_process(self._place.pid)
        return seen if seen is not None and seen.born == self._place.born else None


def next_on_node(places: Sequence[RankInfo]) -> list[int]:
    """For every rank the one after it on the same host, in a circle; itself where it is alone."""
    by_host: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        by_host.setdefault(place.host, []).append(rank)
    following = list(range(len(places)))
    for ranks in by_host.values():
        for rank, after in zip(ranks, [*ranks[1:], ranks[0]], strict=True):
            following[rank] = after
    return following


def thread_position(thread: int) -> tuple[str, bool]:
    """Where a thread is in the program (`loop.py:12 in run`), and whether it is in a collective."""
    stacks = all_stacks()
    stack = stacks.get(thread, [])
    waits = _in_collective(stack)
    if not waits and stack and _BACKWARD in stack[0].filename:
        # On a GPU the backward pass, with its collectives, runs in threads of its own.
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
