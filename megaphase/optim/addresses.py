"""Which elements of which parameters an optimizer's flat tensors hold, on every rank.

DeepSpeed gives an optimizer flat tensors without saying whose elements they are. One that needs
whole parameters, an `AddressedOptimizer`, is told after DeepSpeed has been built around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaphase.checkpoint.parameters import Piece
from megaphase.distributed.parameter_spec import ParameterSpec
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.distributed.sharding import ParameterLayout
from megaphase.optim.untraced import UntracedOptimizer


@dataclass(frozen=True)
class Fragment:
    """A piece of a parameter, and its first element in the flat tensor."""

    name: str
    piece: Piece
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The piece's elements, a view."""
        return flat.narrow(0, self.offset, self.piece.stop - self.piece.start)


@dataclass(frozen=True)
class MasterGroup:
    """A flat fp32 tensor that the optimizer updates, and this rank's pieces in it.

    names: the parameters of which any data-parallel rank has a piece in it, in their order.
    """

    flat: nn.Parameter
    fragments: list[Fragment]
    names: list[str]


@dataclass(frozen=True)
class Addresses:
    """All flat tensors of this rank.

    Attributes:
        stage: of ZeRO; without it every data-parallel rank has all elements.
        layouts, specs: of every parameter, by name.
        groups: by the `id` of the flat tensor.
    """

    grid: ProcessGrid
    stage: int
    layouts: Mapping[str, ParameterLayout]
    specs: Mapping[str, ParameterSpec]
    groups: Mapping[int, MasterGroup]

    def pieces(self, group: MasterGroup) -> dict[str, list[Piece]]:
        """Return of each parameter of a group the piece of every data-parallel rank; it may be
        empty."""
        return dict(zip(group.names, self._pieces(group), strict=True))

    def _pieces(self, group: MasterGroup) -> Iterator[list[Piece]]:
        ranks = range(self.grid.data_size)
        offset, share = 0, group.flat.numel()
        for name in group.names:
            size = self.layouts[name].shard_numel(self.grid.tensor_size)
            if self.stage == 0:
                yield [Piece(0, size) for _ in ranks]
            elif self.stage == 3:
                part = -(-size // self.grid.data_size)
                yield [_between(r * part, (r + 1) * part, size) for r in ranks]
            else:
                yield [_between(r * share - offset, (r + 1) * share - offset, size) for r in ranks]
            offset += size


def _between(start: int, stop: int, size: int) -> Piece:
    return Piece(min(max(start, 0), size), min(max(stop, 0), size))


class AddressedOptimizer(UntracedOptimizer):
    """An optimizer that needs to know whose elements its tensors hold; until then its steps do
    nothing."""

    addresses: Addresses | None = None

    def groups_with_gradients(self) -> Iterator[tuple[dict[str, Any], list[MasterGroup]]]:
        """Yield every group of which there are gradients with its flat tensors."""
        if self.addresses is None:
            return
        for group in self.param_groups:
            found = [flat for flat in group["params"] if flat.grad is not None]
            if found:
                yield group, [self.addresses.groups[id(flat)] for flat in found]

    def counted(self, flats: Sequence[Tensor], *, on_host: bool) -> list[dict[str, Tensor]]:
        """Return the state of flat tensors, in which the steps have been counted.

        on_host: whether the counts are on the CPU, where reading them waits for no device.
        """
        states = [self.state[flat] for flat in flats]
        for flat, state in zip(flats, states, strict=True):
            device = torch.device("cpu") if on_host else flat.device
            if "step" not in state:
                state["step"] = torch.zeros((), device=device)
            state["step"] = state["step"].to(device) + 1
        return states
