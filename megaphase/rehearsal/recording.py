"""What a rehearsal records: kernels, collectives, copies and waits, in their order."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

import megaphase

PACKAGE = os.path.dirname(megaphase.__file__) + os.sep
REHEARSAL = os.path.dirname(__file__) + os.sep
DEEPSPEED = f"{os.sep}deepspeed{os.sep}"


@dataclass(frozen=True)
class Kernel:
    """One kernel on the device.

    name: torch's operator, or `fused:NAME` for a formula that torch.compile joins
    read, written: bytes, each tensor once; flops: of matrix products, else 0
    """

    name: str
    read: int
    written: int
    flops: int
    stream: int


@dataclass(frozen=True)
class Wait:
    """The host waits for the device. place: `file:line` in the package, and in DeepSpeed."""

    kind: str
    place: str


@dataclass(frozen=True)
class Collective:
    """kind: c10d's operator, such as `allreduce_`; elements, nbytes: of the whole tensor, as the
    rank has it that has all; ranks: size of the group."""

    kind: str
    elements: int
    nbytes: int
    group: str
    ranks: int
    place: str

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a ring."""
        rounds = 2 if self.kind.startswith("allreduce") else 1
        return rounds * (self.ranks - 1) / self.ranks * self.nbytes


@dataclass(frozen=True)
class HostCopy:
    """A copy from the host to the device; it is asynchronous only from pinned memory."""

    nbytes: int
    pinned: bool
    non_blocking: bool
    place: str


Event = Kernel | Wait | Collective | HostCopy


@dataclass
class Recording:
    """Events in their order, while it is on."""

    events: list[Event] = field(default_factory=list)
    on: bool = False

    def add(self, event: Event) -> None:
        if self.on:
            self.events.append(event)

    def clear(self) -> None:
        self.events.clear()

    @property
    def kernels(self) -> list[Kernel]:
        return [each for each in self.events if isinstance(each, Kernel)]

    @property
    def waits(self) -> list[Wait]:
        return [each for each in self.events if isinstance(each, Wait)]

    @property
    def collectives(self) -> list[Collective]:
        return [each for each in self.events if isinstance(each, Collective)]

    def count(self, name: str) -> int:
        """Number of kernels of a name."""
        return sum(kernel.name == name for kernel in self.kernels)

    def waits_by_place(self) -> Counter[Wait]:
        return Counter(self.waits)


def place() -> str:
    """The innermost position within the package, and that in DeepSpeed if it is further in."""
    own = library = ""
    for frame, line in _positions():
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            if name.startswith(REHEARSAL):
                continue
            own = f"{name.removeprefix(PACKAGE)}:{line}"
            break
        if DEEPSPEED in name and not library:
            library = f"deepspeed/{name.rpartition(DEEPSPEED)[2]}:{line}"
    return " < ".join(part for part in (library, own) if part)


def called_by(functions: frozenset[str]) -> str | None:
    """The innermost running function that has one of these names."""
    return next((f.f_code.co_name for f, _ in _positions() if f.f_code.co_name in functions), None)


def _positions() -> Iterator[tuple[FrameType, int]]:
    return traceback.walk_stack(None)
