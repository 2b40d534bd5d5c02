"""Exchange small values between all processes, between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megaphase.distributed.all_ranks import Fault, result_or_fault
from megaphase.distributed.process_grid import collective_timeout

Fact = TypeVar("Fact")


class ControlGroup:
    """Collectives over gloo on any device, so none of them waits for a GPU.

    Every method is called by all ranks.
    """

    def __init__(self, stalled_seconds: float = 0.0) -> None:
        """stalled_seconds: after which the watchdog ends a run without progress."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(timeout=collective_timeout(stalled_seconds), backend="gloo")

    def largest(self, *values: int) -> list[int]:
        """Return, for each value, the largest of all ranks."""
        found = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return found.tolist()

    def gather(self, fact: Fact) -> list[Fact]:
        """Return the values of all ranks, in their order."""
        facts: list[Fact] = [fact] * self.world_size
        dist.all_gather_object(facts, fact, group=self._group)
        return facts

    def from_first_rank(self, fact: Fact) -> Fact:
        """Return the value of rank 0."""
        facts = [fact]
        dist.broadcast_object_list(facts, src=0, group=self._group)
        return facts[0]

    def on_first_rank(self, action: Callable[[], Fact]) -> Fact:
        """Run `action` on rank 0 while the others wait; its result or error is that of all
        ranks."""
        shared = [result_or_fault(action) if self.rank == 0 else None]
        dist.broadcast_object_list(shared, src=0, group=self._group)
        outcome = shared[0]
        if isinstance(outcome, Fault):
            raise outcome
        return outcome  # type: ignore[return-value]  # the other ranks' None has been replaced
