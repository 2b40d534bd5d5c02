"""torch's random generators: what they would draw next, kept in checkpoints."""

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
    """What a rank has put into a checkpoint of its generators."""
    with TensorFile(checkpoint / shard_file(rank)) as shard:
        names = [name for name in shard.kinds if name.startswith(RANDOM)]
        return {name.removeprefix(RANDOM): shard.read(name) for name in names}


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Go on from what `random_state` gave; what this machine has no device for is left out."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
