"""The memory that there is, and the check that a model's lasting part fits into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megaphase.config.run import RunConfig
from megaphase.distributed.dist_env import local_world_size, world_size
from megaphase.distributed.process_grid import device
from megaphase.estimate.setup import Device, Setup, setup_of
from megaphase.estimate.state_memory import average_bytes, states_of
from megaphase.estimate.suggestions import GB
from megaphase.model.shape import GPTShape
from megaphase.utils.cgroups import own_cgroups
from megaphase.utils.errors import InputError

_MEMINFO = Path("/proc/meminfo")
_UNLIMITED = 1 << 62  # version 1 has a number for it: 2**63 less a page


def check_memory(config: RunConfig, shape: GPTShape) -> None:
    """Refuse a model that this machine cannot hold, before anything of it is allocated.

    Counted is what stays from step to step: weights, gradients and optimizer state. Activations
    come on top; `megaphase plan` estimates them.

    Raises:
        InputError: saying how much is needed and how much there is.
    """
    on_gpu = device().type == "cuda"
    device_type: Device = "cuda" if on_gpu else "cpu"
    phases = [
        lasting_bytes(setup_of(config, shape, world_size(), device_type, number))
        for number in range(len(config.phases))
    ]
    gpu, host = (max(each) for each in zip(*phases, strict=True))
    if on_gpu:
        there = torch.cuda.get_device_properties(device()).total_memory
        _refuse(config, "GPU", gpu, there)
    processes = local_world_size()
    available = available_bytes()
    if available is not None:
        machine = "machine" if processes == 1 else f"machine, for {processes:,} processes"
        _refuse(config, machine, host * processes, available)


def lasting_bytes(setup: Setup) -> tuple[int, int]:
    """Bytes of one rank from step to step: on its GPU, and in the node's memory."""
    kept = states_of(setup).resident
    state = kept.masters + kept.moments + kept.gradients
    average_here, average_host = average_bytes(setup, kept)
    if setup.device == "cpu":
        return 0, kept.weights + state + average_here
    places = {"none": (1, 0), "cpu": (0, 1), "nvme": (0, 0)}
    (state_gpu, state_host), (weights_gpu, weights_host) = (
        places[each] for each in (setup.offload, setup.offload_parameters)
    )
    return (
        state_gpu * state + weights_gpu * kept.weights + average_here,
        state_host * state + weights_host * kept.weights + average_host,
    )


def available_bytes() -> int | None:
    """Memory that new processes can have, within the limits of this one's cgroup; None: unknown."""
    found = [*_of_the_machine(), *_of_cgroups()]
    return min(found, default=None)


def _of_the_machine() -> Iterator[int]:
    try:
        lines = _MEMINFO.read_text().splitlines()
        kilobytes = {name: value.split()[0] for name, value in (line.split(":") for line in lines)}
        yield int(kilobytes["MemAvailable"]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return


def _of_cgroups() -> Iterator[int]:
    """What is left below the limit of every cgroup around this process; the page cache is left, as
    in MemAvailable."""
    for folder, version in own_cgroups("memory"):
        if version == 2:
            names, prefix = ("memory.max", "memory.current"), ""
        else:  # there, figures with this prefix count the cgroups within, too
            names, prefix = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        try:
            limit, used = (int((folder / name).read_text()) for name in names)
            figures = dict(line.split() for line in (folder / "memory.stat").open())
        except (OSError, ValueError):  # no such limit: `max`
            continue
        cached = (int(figures.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
        if limit < _UNLIMITED:
            yield max(0, limit - used + sum(cached))


def _refuse(config: RunConfig, of: str, needed: int, there: int) -> None:
    if needed <= there:
        return
    parallel = config.parallel
    ways = ["make the model smaller (model.layers, hidden, ffn, vocab)"]
    ways.append("take more processes with " + ("zero 3" if parallel.zero < 3 else "tensor"))
    if of == "GPU" and parallel.offload == "none":
        ways.append("set parallel.offload: cpu")
    raise InputError(
        config.where("model"),
        f"weights and optimizer state need {needed / GB:,.1f} GB of this {of}, which has "
        f"{there / GB:,.1f} GB",
        f"{', '.join(ways[:-1])} or {ways[-1]}",
    )
