"""Initial weights that are a function of the seed and the parameter's name alone.

Every rank draws the whole parameter from its own generator and keeps its shard, so the weights do
not depend on the layout, nor on the order in which layers are built.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from megaphase.distributed.parameter_spec import Normal, ParameterSpec
from megaphase.distributed.process_grid import device
from megaphase.utils.seeds import derive_key


@dataclass(frozen=True)
class Initializer:
    """Draws parameters; `at(part)` is the initializer of a submodule."""

    seed: int
    dtype: torch.dtype
    path: str = ""

    @property
    def device(self) -> torch.device:
        """Where the model is built."""
        return device()

    def at(self, part: str) -> Self:
        """The initializer whose names start with `part`."""
        return replace(self, path=f"{self.path}{part}.")

    def draw(self, name: str, spec: ParameterSpec) -> Tensor:
        """The whole parameter, on the CPU (GPUs draw other numbers)."""
        if not isinstance(spec.init, Normal):
            return torch.full(spec.shape, spec.init.value, dtype=self.dtype)
        generator = torch.Generator("cpu")
        generator.manual_seed(derive_key(self.seed, "init", self.path + name) >> 1)
        values = torch.empty(spec.shape).normal_(0, spec.init.std, generator=generator)
        return values.to(self.dtype)


class Uninitialized(Initializer):
    """Only allocates the parameters, for a model whose weights are about to be read."""

    def draw(self, name: str, spec: ParameterSpec) -> Tensor:
        return torch.empty(spec.shape, dtype=self.dtype)


class OnMeta(Initializer):
    """Gives parameters neither memory nor values, for a model that only declares them."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")

    def draw(self, name: str, spec: ParameterSpec) -> Tensor:
        return torch.empty(spec.shape, dtype=self.dtype, device=self.device)
