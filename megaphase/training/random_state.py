"""The states of torch's random generators, which checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megaphase.checkpoint.parameters import RANDOM, shard_file
from megaphase.checkpoint.tensor_file import TensorFile


def random_state() -> dict[str, Tensor]:
    """The states of this process's generators by device, uint8, on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def stored_random_state(checkpoint: Path, rank: int) -> dict[str, Tensor]:
    """The states of a rank's generators in a checkpoint."""
    with TensorFile(checkpoint / shard_file(rank)) as shard:
        names = [name for name in shard.kinds if name.startswith(RANDOM)]
        return {name.removeprefix(RANDOM): shard.read(name) for name in names}


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` gave; states of devices that this machine lacks are ignored."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
