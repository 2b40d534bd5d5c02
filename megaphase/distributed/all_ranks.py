"""Run actions on all processes, and stop all of them if one fails.

Importing torch takes seconds, so it is imported only if there are several processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from megaphase.distributed.dist_env import global_rank, world_size
from megaphase.distributed.lost_connection import is_collective_error
from megaphase.utils.errors import InputError, LostProcessError, RunError, os_fault

Result = TypeVar("Result")
Fault = InputError | RunError


def run_on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run `action` on every process.

    If any process raises an InputError or RunError, the lowest rank's error is raised on all of
    them. torch is imported only if there are several processes.
    """
    outcome = result_or_fault(action)
    faults = [outcome] if world_size() == 1 else _gather_faults(outcome)
    for fault in faults:
        if isinstance(fault, Fault):
            raise fault
    assert not isinstance(outcome, Fault)
    return outcome


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 while the others wait; its result or error is that of all ranks.

    torch is imported only if there are several processes.
    """
    if world_size() == 1:
        return action()
    import torch.distributed as dist

    from megaphase.distributed.process_grid import exchange_group, join_processes

    join_processes()
    shared = [result_or_fault(action) if global_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0, group=exchange_group())
    outcome = shared[0]
    if isinstance(outcome, Fault):
        raise outcome
    return outcome  # type: ignore[return-value]  # the other ranks' None has been replaced


def gather_from_all_ranks(value: Result) -> list[Result]:
    """Return the values of all ranks, in their order; called by all ranks."""
    return [value] if world_size() == 1 else _gather(value)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group, and leave it at the end in any case."""
    from megaphase.distributed.process_grid import join_processes

    with leaving_processes():
        join_processes()
        yield


@contextmanager
def leaving_processes() -> Iterator[None]:
    """Leave the process group at the end in any case, if this process has joined it.

    A process that ends as a member still has the threads of its collectives; if one of them then
    frees a tensor, the process ends with SIGABRT instead of its exit code.

    Raises:
        LostProcessError: a collective failed while no watchdog could report why.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and is_collective_error(error):
            raise LostProcessError(
                f"rank {global_rank()} has lost the connection to another process, which has "
                "ended or cannot be reached"
            ) from None
        raise
    finally:
        if "torch.distributed" in sys.modules:
            from megaphase.distributed.process_grid import leave_processes

            leave_processes()


def result_or_fault(action: Callable[[], Result]) -> Result | Fault:
    """Return the result of `action`, or the error that it raises, including an OSError with a
    path."""
    try:
        return action()
    except (InputError, RunError) as fault:
        return fault
    except OSError as error:
        found = os_fault(error)
        if found is None:
            raise
        return found


def _gather_faults(outcome: object) -> list[Fault | None]:
    return _gather(outcome if isinstance(outcome, Fault) else None)


def _gather(value: Result) -> list[Result]:
    import torch.distributed as dist

    from megaphase.distributed.process_grid import exchange_group, join_processes

    join_processes()
    values = [value] * world_size()
    dist.all_gather_object(values, value, group=exchange_group())
    return values
