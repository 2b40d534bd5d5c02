"""The groups of a run: how long their collectives wait, and over which of them objects travel."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from distributed import run_ranks

from megaphase.distributed.all_ranks import gather_from_all_ranks, on_first_rank, process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import (
    collective_timeout,
    device,
    set_timeout,
    start_process_grid,
)
from megaphase.launch.local import free_port

PROCESSES = 2
STALLED_SECONDS = 10_000.0
NCCL = "nccl"


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    found: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return found


def test_the_watchdog_comes_before_the_timeout_of_a_collective() -> None:
    assert collective_timeout(900.0) == timedelta(minutes=60)
    expected = timedelta(seconds=2 * STALLED_SECONDS)
    with process_group():
        grid = start_process_grid(1, STALLED_SECONDS)
        control = ControlGroup(STALLED_SECONDS)
        other = dist.new_group()
        set_timeout(other, expected)
        groups = (dist.group.WORLD, grid.tensor_group, grid.data_group, control._group, other)
        for group in groups:
            assert group is not None
            assert timeout_of(group) == expected


def exchange() -> dict[str, Any]:
    """On a rank, whose GPU and whose NCCL are pretended: what is read before NCCL is used."""
    before = dist.init_process_group, dist.broadcast_object_list, dist.all_gather_object
    used: list[str] = []

    def joined(backend: str, **options: Any) -> None:
        used.append(backend)
        before[0]("gloo", **options)

    def group_of(options: dict[str, Any]) -> str:
        group = options["group"]
        return "all processes" if group in (None, dist.group.WORLD) else "own"

    def broadcast(objects: list[Any], **options: Any) -> None:
        used.append(group_of(options))
        before[1](objects, **options)

    def gathered(objects: list[Any], value: Any, **options: Any) -> None:
        used.append(group_of(options))
        before[2](objects, value, **options)

    dist.init_process_group = joined
    dist.broadcast_object_list, dist.all_gather_object = broadcast, gathered
    torch.cuda.is_available = lambda: True  # type: ignore[method-assign]
    torch.cuda.device_count = lambda: PROCESSES  # type: ignore[method-assign]
    torch.cuda.set_device = lambda device: None  # type: ignore[method-assign]
    with process_group():
        assert device().type == "cuda"
        first = on_first_rank(lambda: dist.get_rank())
        found = gather_from_all_ranks((dist.get_rank(), free_port()))
        ranks = [rank for rank, _ in found]
    # A rank that joins at the port of the first group may still meet its store, and wait forever.
    os.environ["MASTER_PORT"] = str(found[0][1])
    with process_group():  # again, after the first was left
        again = on_first_rank(lambda: dist.get_rank())
    return {"used": used, "found": (first, ranks, again)}


def test_nothing_begins_nccl_before_the_run_file_is_known() -> None:
    """It reads its variables once, which `deterministic: true` sets."""
    for found in run_ranks(exchange, PROCESSES):
        assert found["found"] == (0, [0, 1], 0)
        assert found["used"] == [NCCL, "own", "own", NCCL, "own"]
