"""The way into and out of tensor-parallel regions of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megaphase.distributed.collectives import (
    copy_to_tensor_parallel,
    gather_sequence,
    reduce_async,
)
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.distributed.sharding import layout_of


class TensorRegion:
    """The way into and out of the part of a layer that is computed tensor-parallel.

    Outside, activations are whole on every rank or, with sequence parallelism, each rank holds
    its share of the sequence: [batch, seq / tensor, hidden].
    """

    def __init__(self, grid: ProcessGrid, sequence: bool) -> None:
        self.grid = grid
        self.sequence = sequence
        self._copies: dict[Tensor, Tensor] = {}
        self._casts: dict[Tensor, Tensor] | None = None

    def enter(self, x: Tensor) -> Tensor:
        """Whole activations on every rank: [batch, seq, hidden]."""
        if self.sequence:
            return gather_sequence(x, self.grid)
        return copy_to_tensor_parallel([x], self.grid)[0]

    def reduce_async(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to sum the ranks' partial results in place; the function returned waits for the
        sum."""
        return reduce_async(x, self.grid, self.sequence)

    def own_positions(self, x: Tensor) -> Tensor:
        """Of [..., seq, hidden], the positions that this rank holds outside the region."""
        if not self.sequence:
            return x
        return x.chunk(self.grid.tensor_size, dim=-2)[self.grid.tensor_rank]

    def replicated(self, parameter: Tensor) -> Tensor:
        """A replicated parameter used outside the region.

        With sequence parallelism each rank sees its share of the positions only, so the
        parameter's gradient is summed over the group.
        """
        if not self.sequence:
            return parameter
        if parameter in self._copies:
            return self._copies[parameter]
        return copy_to_tensor_parallel([parameter], self.grid)[0]

    def replicated_inside(self, *parameters: Tensor) -> Sequence[Tensor]:
        """Replicated parameters used inside the region.

        Each rank uses them for its own heads only, so their gradients are summed over the group.
        """
        if all(each in self._copies for each in parameters):
            return [self._copies[each] for each in parameters]
        return copy_to_tensor_parallel(parameters, self.grid)

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight in the activations' type; within `shared`, every call returns the same copy."""
        if weight.dtype == dtype or self._casts is None:
            return weight.to(dtype)
        if weight not in self._casts:
            self._casts[weight] = weight.detach().to(dtype)
        cast: Tensor = _Cast.apply(weight, self._casts[weight])
        return cast

    @contextmanager
    def with_whole_sequences(self) -> Iterator[None]:
        """Within, without sequence parallelism: sequences may have any length."""
        before, self.sequence = self.sequence, False
        try:
            yield
        finally:
            self.sequence = before

    @contextmanager
    def shared(self, module: nn.Module) -> Iterator[None]:
        """Within, the parts of a micro-batch share casts and copies of a module's parameters.

        Weights are cast once, and the gradients of all replicated parameters are summed in one
        collective.
        """
        if self.sequence:
            whole = [each for each in module.parameters() if layout_of(each).dim is None]
            copies = copy_to_tensor_parallel(whole, self.grid)
            self._copies = dict(zip(whole, copies, strict=True))
        self._casts = {}
        try:
            yield
        finally:
            self._copies, self._casts = {}, None


class _Cast(torch.autograd.Function):
    """A cast whose result already exists; gradients are summed in the weight's type."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None
