"""Building a layer's parameters on one rank from their specifications."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from megaphase.distributed.initialization import Initializer
from megaphase.distributed.parameter_spec import ParameterSpec
from megaphase.distributed.tensor_region import TensorRegion
from megaphase.ops.kernels import EAGER, Kernels


@dataclass(frozen=True)
class LayerBuilder:
    """All that layers are built with; `at(part)` is the builder of a submodule.

    kernels: compute the operations between the matrix products.
    """

    init: Initializer
    region: TensorRegion
    kernels: Kernels = EAGER

    @property
    def device(self) -> torch.device:
        return self.init.device

    @property
    def path(self) -> str:
        """The layer's name within the model."""
        return self.init.path.removesuffix(".")

    def at(self, part: str) -> LayerBuilder:
        return replace(self, init=self.init.at(part))

    def parameter(self, name: str, spec: ParameterSpec) -> nn.Parameter:
        """This rank's shard of a parameter, which carries its specification and its layout.

        Sharded parameters also carry `model_parallel` and `tensor_model_parallel`: DeepSpeed counts
        those without them once in the gradient norm.
        """
        grid = self.region.grid
        layout = spec.layout(grid.tensor_size)
        shard = layout.shard(self.init.draw(name, spec), grid.tensor_rank, grid.tensor_size)
        parameter = nn.Parameter(shard.to(self.device))
        parameter.parameter_spec = spec  # type: ignore[attr-defined]
        parameter.parallel_layout = layout  # type: ignore[attr-defined]
        if layout.dim is not None:
            sharded = grid.tensor_size > 1
            parameter.tensor_model_parallel = parameter.model_parallel = sharded  # type: ignore[attr-defined]
        return parameter
