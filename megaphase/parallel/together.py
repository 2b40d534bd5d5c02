"""Steps that all processes take together: where one meets wrong input, all of them stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megaphase.errors import InputError
from megaphase.parallel.launcher import global_rank, world_size

Result = TypeVar("Result")


def together(action: Callable[[], Result]) -> Result:
    """Run `action` on every process.

    Raises InputError on all of them, the lowest rank's, where any of them raised one. torch is
    imported only if there are several processes.
    """
    outcome = _outcome(action)
    errors = [outcome] if world_size() == 1 else _gather_errors(outcome)
    for error in errors:
        if isinstance(error, InputError):
            raise error
    assert not isinstance(outcome, InputError)
    return outcome


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 while the others wait; all get its result, or raise its InputError."""
    import torch.distributed as dist

    from megaphase.parallel.topology import device, join_processes

    join_processes()
    shared = [_outcome(action) if global_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0, device=device())
    outcome = shared[0]
    if isinstance(outcome, InputError):
        raise outcome
    return outcome  # type: ignore[return-value]  # the other ranks' None has been replaced


def _outcome(action: Callable[[], Result]) -> Result | InputError:
    try:
        return action()
    except InputError as error:
        return error


def _gather_errors(outcome: object) -> list[InputError | None]:
    import torch.distributed as dist

    from megaphase.parallel.topology import join_processes

    join_processes()
    errors: list[InputError | None] = [None] * world_size()
    dist.all_gather_object(errors, outcome if isinstance(outcome, InputError) else None)
    return errors
