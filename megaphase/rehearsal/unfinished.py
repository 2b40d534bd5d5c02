"""Collectives that are still running, and operators that touch their tensors too early."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch._C._distributed_c10d import FakeWork


class Region(NamedTuple):
    """Bytes [start, stop) of a storage."""

    storage: int
    start: int
    stop: int

    @classmethod
    def of(cls, x: Tensor) -> Region:
        each = x.element_size()
        start = int(x.storage_offset()) * each
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        stop = start + (int(last) + 1) * each if x.numel() else start
        return cls(x.untyped_storage()._cdata, start, stop)

    def overlaps(self, other: Region) -> bool:
        same = self.storage == other.storage
        return same and self.start < other.stop and other.start < self.stop


class Running(NamedTuple):
    """A collective that has been started. The tensors are kept, so that no storage is reused."""

    name: str
    work: FakeWork
    outputs: list[Region]
    inputs: list[Region]
    kept: list[Tensor]


class UnfinishedCollectives:
    """Those that have been started and not yet been waited for.

    Attributes:
        started: number of collectives so far
        conflicts: operators that read or wrote what a running collective writes, or wrote what it
            reads, with the place
    """

    def __init__(self) -> None:
        self.started = 0
        self.conflicts: Counter[tuple[str, str, str]] = Counter()
        self._running: dict[int, Running] = {}
        wait = FakeWork.wait

        def finish(work: FakeWork, *args: Any) -> Any:
            self._running.pop(id(work), None)
            return wait(work, *args)

        FakeWork.wait = finish  # type: ignore[assignment, method-assign]

    def __len__(self) -> int:
        return len(self._running)

    def start(self, name: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> FakeWork:
        work = FakeWork()
        self.started += 1
        regions = [Region.of(x) for x in outputs], [Region.of(x) for x in inputs]
        self._running[id(work)] = Running(name, work, *regions, [*outputs, *inputs])
        return work

    def check(
        self,
        name: str,
        touched: Sequence[Tensor],
        written: Sequence[Tensor],
        place: Callable[[], str],
    ) -> None:
        """Note an operator that must have waited.

        touched: all its tensors; written: those among them that it changes.
        """
        changes = [Region.of(x) for x in written]
        regions = [Region.of(x) for x in touched]
        for running in self._running.values():
            if any(a.overlaps(b) for a in regions for b in running.outputs) or any(
                a.overlaps(b) for a in changes for b in running.inputs
            ):
                self.conflicts[name, running.name, place()] += 1
