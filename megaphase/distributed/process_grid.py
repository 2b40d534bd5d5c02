"""The grid of processes: tensor-parallel neighbours times data-parallel replicas."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megaphase.distributed.dist_env import (
    check_rendezvous,
    global_rank,
    local_rank,
    local_world_size,
    world_size,
)
from megaphase.distributed.triton_cache import use_local_triton_cache
from megaphase.utils.errors import InputError, RunError

# Long enough for rank 0 to build a plan or verify a checkpoint while the others wait.
_COLLECTIVE_TIMEOUT = timedelta(minutes=60)
# Processes of one job start within minutes of each other, or not at all.
JOIN_TIMEOUT = timedelta(minutes=10)

_exchange: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class ProcessGrid:
    """A grid of tensor × data processes; tensor-parallel ranks are neighbours (one node's GPUs).

    It is also the `mpu` that DeepSpeed asks for groups, ranks and sizes.
    """

    world_size: int
    rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_size

    @property
    def data_size(self) -> int:
        return self.world_size // self.tensor_size

    @property
    def is_first(self) -> bool:
        """Whether this process writes the metrics and reports for all."""
        return self.rank == 0

    # The names of the same values in DeepSpeed's interface.
    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group


def device() -> torch.device:
    """Return this process's GPU, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def join_processes() -> None:
    """Join the process group described by the environment; a single process forms its own.

    Raises:
        InputError: the environment describes none.
        RunError: some of the processes have not joined.
    """
    if dist.is_initialized():
        return
    check_rendezvous()
    backend = "gloo"
    if device().type == "cuda":
        backend = "nccl"
        _check_gpus()
        torch.cuda.set_device(device())
        use_local_triton_cache()
    if world_size() == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        store = _rendezvous()
        dist.init_process_group(
            backend,
            timeout=_COLLECTIVE_TIMEOUT,
            store=store,
            rank=global_rank(),
            world_size=world_size(),
        )
        if backend == "nccl":
            global _exchange
            _exchange = dist.new_group(timeout=_COLLECTIVE_TIMEOUT, backend="gloo")


def _check_gpus() -> None:
    """Raises on every rank of the machine, since only rank 0 is heard."""
    here, gpus = max(local_world_size(), local_rank() + 1), torch.cuda.device_count()
    if here > gpus:
        raise InputError(
            "LOCAL_WORLD_SIZE",
            f"{here:,} processes on this machine see {gpus:,} GPU{'s' * (gpus != 1)}",
            "start one process for each GPU, and let all of them see all GPUs",
        )


def exchange_group() -> dist.ProcessGroup | None:
    """Return the group over which objects are exchanged before the run file is known; None for the
    group of all processes, where that is of gloo.

    NCCL reads its variables when the first of its collectives begins, so none may begin before
    `deterministic: true` has set them.
    """
    return _exchange


def leave_processes() -> None:
    """Leave the process group, if this process has joined it."""
    global _exchange
    _exchange = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _rendezvous() -> dist.Store:
    """Return the store through which all processes have found each other."""
    try:
        store: dist.Store
        store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    except (dist.DistStoreError, dist.DistNetworkError):
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(
            f"the {world_size()} processes have not found each other at {where} within "
            f"{JOIN_TIMEOUT.total_seconds():.0f} s; see whether one has ended, or whether the "
            "nodes cannot reach that address"
        ) from None
    store.set_timeout(_COLLECTIVE_TIMEOUT)
    return store


def collective_timeout(stalled_seconds: float) -> timedelta:
    """Return how long a collective waits for the other ranks.

    The watchdog comes first (`faults.stalled_seconds`): it can say which rank hangs, and where.
    Where no time is given, torch ends a process that waits in a new group after 10 minutes with
    NCCL.
    """
    return max(_COLLECTIVE_TIMEOUT, timedelta(seconds=2 * stalled_seconds))


def set_timeout(group: dist.ProcessGroup | None, timeout: timedelta) -> None:
    """Set how long the collectives of a group wait that has been formed without it, as DeepSpeed
    forms its own; None: the group of all processes."""
    if dist.get_backend(group) in ("nccl", "gloo"):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def start_process_grid(tensor_size: int, stalled_seconds: float = 0.0) -> ProcessGrid:
    """Join the process group and form the tensor- and data-parallel groups.

    stalled_seconds: after which the watchdog ends a run without progress.
    """
    join_processes()
    timeout = collective_timeout(stalled_seconds)
    set_timeout(None, timeout)
    world, rank = dist.get_world_size(), dist.get_rank()
    assert world % tensor_size == 0, "RunConfig.data_ranks comes first"
    first = rank - rank % tensor_size
    # Each process forms only its own groups, with their members alone.
    return ProcessGrid(
        world,
        rank,
        tensor_size,
        _own_group(range(first, first + tensor_size), timeout, _high_priority(timeout)),
        _own_group(range(rank % tensor_size, world, tensor_size), timeout),
    )


def _own_group(ranks: Sequence[int], timeout: timedelta, options: Any = None) -> dist.ProcessGroup:
    group: dist.ProcessGroup
    group = dist.new_group(ranks, timeout, use_local_synchronization=True, pg_options=options)
    return group


def _high_priority(timeout: timedelta) -> Any:
    """Options of a group whose collectives the GPU starts before other work that waits.

    Tensor-parallel collectives are short, and every product after them needs their results.
    """
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    options._timeout = timeout
    return options
