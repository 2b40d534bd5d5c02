"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaphase.checkpoint.state import COLUMNS, ROWS
from megaphase.distributed.process_grid import device
from megaphase.distributed.sharding import ParameterLayout
from megaphase.optim.addresses import AddressedOptimizer, Addresses, Fragment, MasterGroup
from megaphase.optim.config import AdafactorConfig
from megaphase.optim.parameter_state import FIRST, SECOND


class Adafactor(AddressedOptimizer):
    """Scales gradients by the root of their mean squares, of rows and of columns for matrices.

    All means are those of the whole parameter, whatever the layout: sums are added over the ranks
    that have its pieces. The means of rows and columns are stored whole on every rank. Overwrites
    the gradients.
    """

    def __init__(self, groups: list[dict[str, Any]], config: AdafactorConfig, *, lr: float) -> None:
        """groups: each with parameters that are all `factored`, or none of them."""
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "factored": False})
        self._config = config

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # none is ever given
        for group, masters in self.groups_with_gradients():
            assert self.addresses is not None
            parts = [
                _Part(master, fragment, self.addresses)
                for master in masters
                for fragment in master.fragments
            ]
            names = [name for master in masters for name in master.names]
            steps = self._prepare(masters, factored=group["factored"])
            decay = 1.0 - steps**-self._config.decay_exponent
            sizes = self._root_mean_squares(parts, names, of_weights=True)
            if group["factored"]:
                self._scale_by_factors(masters, parts, decay)
            else:
                self._scale(masters, decay)
            updates = self._root_mean_squares(parts, names, of_weights=False)
            for part in parts:
                index = names.index(part.name)
                rate = group["lr"] / (updates[index] / self._config.update_clip).clamp(min=1.0)
                if self._config.scale_by_weights:
                    rate = rate * sizes[index].clamp(min=self._config.smallest_scale)
                part.gradient.mul_(rate.to(part.gradient.device))
            for master in masters:
                self._apply(group, master)

    def _prepare(self, masters: list[MasterGroup], *, factored: bool) -> float:
        """Count the step, and make the state before the first one; returns the count."""
        assert self.addresses is not None
        states = self.counted([master.flat for master in masters], on_host=True)
        for master, state in zip(masters, states, strict=True):
            if self._config.beta1 is not None and FIRST not in state:
                state[FIRST] = torch.zeros_like(master.flat)
            if not factored and SECOND not in state:
                state[SECOND] = torch.zeros_like(master.flat)
            if factored and ROWS not in state:
                rows, columns = factor_sizes(master, self.addresses)
                state[ROWS] = master.flat.new_zeros(rows)
                state[COLUMNS] = master.flat.new_zeros(columns)
        return float(states[0]["step"])

    def _scale_by_factors(
        self, masters: list[MasterGroup], parts: list[_Part], decay: float
    ) -> None:
        """Divide the gradients by the root of the product of the means of rows and columns."""
        assert self.addresses is not None
        epsilon, layouts = self._config.eps, self.addresses.layouts
        offsets, total = {}, 0
        for master in masters:
            for name in master.names:
                offsets[name] = total
                total += sum(layouts[name].shape)
        sums = masters[0].flat.new_zeros(total)
        for part in parts:
            if part.counts:
                part.add_sums(sums[offsets[part.name] :])
        self._sum_over_ranks(sums)
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for master in masters:
            state = self.state[master.flat]
            for name, rows, columns in split_factors(master, self.addresses, state):
                found = sums[offsets[name] :][: len(rows) + len(columns)]
                of_rows, of_columns = found.split([len(rows), len(columns)])
                rows.lerp_(of_rows / len(columns) + epsilon, 1.0 - decay)
                columns.lerp_(of_columns / len(rows) + epsilon, 1.0 - decay)
                factors[name] = (rows / rows.mean()).rsqrt(), columns.rsqrt()
        for part in parts:
            part.scale(*factors[part.name])

    def _scale(self, masters: list[MasterGroup], decay: float) -> None:
        for master in masters:
            assert master.flat.grad is not None
            mean: Tensor = self.state[master.flat][SECOND]
            mean.lerp_(master.flat.grad.square() + self._config.eps, 1.0 - decay)
            master.flat.grad.mul_(mean.rsqrt())

    def _root_mean_squares(
        self, parts: list[_Part], names: list[str], *, of_weights: bool
    ) -> Tensor:
        """Return those of the whole parameters, or of their gradients; [names]."""
        assert self.addresses is not None
        like = parts[0].weight if parts else torch.empty(0)
        sums = torch.zeros(len(names), device=like.device if parts else device())
        for part in parts:
            if part.counts:
                values = part.weight if of_weights else part.gradient
                mean = (
                    torch.linalg.vector_norm(values) ** 2 / self.addresses.layouts[part.name].numel
                )
                sums[names.index(part.name)] += mean
        self._sum_over_ranks(sums)
        return sums.sqrt()

    def _sum_over_ranks(self, sums: Tensor) -> None:
        """Add over the ranks that have different elements of the same parameters."""
        assert self.addresses is not None
        grid = self.addresses.grid
        if grid.world_size == 1 or (self.addresses.stage == 0 and grid.tensor_size == 1):
            return
        there = sums.to(device())
        dist.all_reduce(there, group=grid.tensor_group if self.addresses.stage == 0 else None)
        sums.copy_(there)

    def _apply(self, group: dict[str, Any], master: MasterGroup) -> None:
        update = master.flat.grad
        assert update is not None
        if self._config.beta1 is not None:
            momentum: Tensor = self.state[master.flat][FIRST]
            momentum.lerp_(update, 1.0 - self._config.beta1)
            update = momentum
        master.flat.mul_(1.0 - group["lr"] * group["weight_decay"])
        master.flat.sub_(update)


def factor_sizes(master: MasterGroup, addresses: Addresses) -> tuple[int, int]:
    """Return the rows and the columns of all parameters of a flat tensor."""
    shapes = [addresses.layouts[name].shape for name in master.names]
    return sum(rows for rows, _ in shapes), sum(columns for _, columns in shapes)


def split_factors(
    master: MasterGroup, addresses: Addresses, state: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each parameter's name and its means of rows and of columns, views."""
    shapes = [addresses.layouts[name].shape for name in master.names]
    rows = state[ROWS].split([shape[0] for shape in shapes])
    columns = state[COLUMNS].split([shape[1] for shape in shapes])
    yield from zip(master.names, rows, columns, strict=True)


@dataclass(frozen=True)
class _Block:
    """Consecutive elements of a matrix that are whole rows, or a part of one.

    first: of the elements within the fragment. row, column: of the first in the matrix.
    """

    first: int
    row: int
    column: int
    rows: int
    columns: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.first, self.rows * self.columns).view(self.rows, self.columns)


class _Part:
    """This rank's piece of a parameter.

    Attributes:
        counts: whether it counts in sums over ranks, of which several may have it.
    """

    def __init__(self, master: MasterGroup, fragment: Fragment, addresses: Addresses) -> None:
        assert master.flat.grad is not None
        self.name, self._fragment = fragment.name, fragment
        self._layout: ParameterLayout = addresses.layouts[fragment.name]
        self._size, self._rank = addresses.grid.tensor_size, addresses.grid.tensor_rank
        self.counts = self._layout.dim is not None or self._rank == 0
        if not master.flat.grad.is_contiguous():
            master.flat.grad = master.flat.grad.contiguous()
        self.weight = fragment.of(master.flat.data.view(-1))
        self.gradient = fragment.of(master.flat.grad.view(-1))

    def add_sums(self, sums: Tensor) -> None:
        """Add the sums of squares of each row and column to those of the whole matrix, [rows +
        columns]."""
        shape = self._layout.shard_shape(self._size)
        rows, columns = self.gradient.new_zeros(shape[0]), self.gradient.new_zeros(shape[1])
        for block in self._blocks(shape[1]):
            values = block.of(self.gradient).square()
            rows.narrow(0, block.row, block.rows).add_(values.sum(1))
            columns.narrow(0, block.column, block.columns).add_(values.sum(0))
        whole_rows, whole_columns = self._layout.shape
        self._add_to(sums[:whole_rows], rows, 0)
        self._add_to(sums[whole_rows : whole_rows + whole_columns], columns, 1)

    def scale(self, rows: Tensor, columns: Tensor) -> None:
        """Multiply the gradient by factors of the whole matrix's rows and columns."""
        shape = self._layout.shard_shape(self._size)
        own_rows, own_columns = self._own(rows, shape[0], 0), self._own(columns, shape[1], 1)
        for block in self._blocks(shape[1]):
            of_rows = own_rows.narrow(0, block.row, block.rows).unsqueeze(1)
            of_columns = own_columns.narrow(0, block.column, block.columns).unsqueeze(0)
            block.of(self.gradient).mul_(of_rows).mul_(of_columns)

    def _add_to(self, whole: Tensor, own: Tensor, dim: int) -> None:
        if dim != self._layout.dim:
            whole.add_(own)
            return
        for run in self._layout.runs(self._rank, self._size):
            run.of_whole(whole, 0).add_(run.of_shard(own, 0))

    def _own(self, whole: Tensor, length: int, dim: int) -> Tensor:
        if dim != self._layout.dim:
            return whole
        own = whole.new_zeros(length)
        for run in self._layout.runs(self._rank, self._size):
            run.of_shard(own, 0).copy_(run.of_whole(whole, 0))
        return own

    def _blocks(self, width: int) -> Iterator[_Block]:
        """Of the piece, as the rank's matrix of this width has it: the rest of a row, whole rows,
        the beginning of a row."""
        position, stop = self._fragment.piece.start, self._fragment.piece.stop
        start = position
        while position < stop:
            row, column = divmod(position, width)
            if column or stop - position < width:
                rows, columns = 1, min(width - column, stop - position)
            else:
                rows, columns = (stop - position) // width, width
            yield _Block(position - start, row, column, rows, columns)
            position += rows * columns
