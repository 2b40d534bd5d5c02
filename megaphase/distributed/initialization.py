"""Initial weights that are a function of the seed and the parameter's name alone.

Every rank draws the whole parameter from its own generator and keeps its shard, so the weights do
not depend on the layout, nor on the order in which layers are built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaphase.utils.seeds import derive_key


@dataclass(frozen=True)
class Initializer:
    """Draws parameters; `at(part)` is the initializer of a submodule."""

    seed: int
    dtype: torch.dtype
    path: str = ""

    def at(self, part: str) -> Initializer:
        """The initializer whose names start with `part`."""
        return Initializer(self.seed, self.dtype, f"{self.path}{part}.")

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> Tensor:
        """The whole parameter, N(0, std²), on the CPU (GPUs draw other numbers)."""
        generator = torch.Generator("cpu")
        generator.manual_seed(derive_key(self.seed, "init", self.path + name) >> 1)
        return torch.empty(shape).normal_(0, std, generator=generator).to(self.dtype)

    def constant(self, shape: tuple[int, ...], value: float) -> Tensor:
        """A parameter that starts at one value everywhere."""
        return torch.full(shape, value, dtype=self.dtype)
