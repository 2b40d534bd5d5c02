"""Hands whole matrices to one rank each, from pieces on all ranks, and their results back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaphase.checkpoint.parameters import Piece
from megaphase.distributed.process_grid import ProcessGrid, device
from megaphase.optim.addresses import Addresses, Fragment, MasterGroup


@dataclass(frozen=True)
class _Matrix:
    """A matrix that one rank gets whole.

    pieces: of every data-parallel rank. own: this rank's, None if it has none.
    """

    name: str
    owner: int
    pieces: list[Piece]
    own: tuple[int, Fragment] | None


class WholeMatrices:
    """The matrices of some flat tensors, shared among all ranks of the run.

    A matrix goes to the rank with the least to do so far. In a round every rank gets at most one,
    so a rank needs memory for its largest matrix, and for its pieces of as many as there are ranks.
    """

    def __init__(
        self, groups: Sequence[MasterGroup], addresses: Addresses, work: Mapping[str, int]
    ) -> None:
        """
        groups: with pieces of the matrices, the same on all ranks. work: of each matrix.
        """
        self._grid: ProcessGrid = addresses.grid
        self._layouts, self._stage = addresses.layouts, addresses.stage
        found: dict[str, tuple[list[Piece], tuple[int, Fragment] | None]] = {}
        for number, group in enumerate(groups):
            own = {fragment.name: (number, fragment) for fragment in group.fragments}
            for name, pieces in addresses.pieces(group).items():
                found[name] = pieces, own.get(name)
        load = [0] * self._grid.world_size
        mine: list[list[_Matrix]] = [[] for _ in load]
        for name in sorted(found, key=lambda each: work[each], reverse=True):
            owner = load.index(min(load))
            load[owner] += work[name]
            mine[owner].append(_Matrix(name, owner, *found[name]))
        most = max(map(len, mine), default=0)
        self._rounds = [[each[i] for each in mine if i < len(each)] for i in range(most)]

    def apply(
        self, function: Callable[[str, Tensor], Tensor], flats: Sequence[Tensor], dtype: torch.dtype
    ) -> None:
        """Replace the elements of the matrices in flat tensors by those of a function's results.

        function: of a matrix's name and the whole matrix, on the run's device in `dtype`, which is
        also that of what is sent.
        """
        for matrices in self._rounds:
            self._round(matrices, function, flats, dtype)

    def _round(
        self,
        matrices: Sequence[_Matrix],
        function: Callable[[str, Tensor], Tensor],
        flats: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> None:
        grid = self._grid
        mine = next((each for each in matrices if each.owner == grid.rank), None)
        sent: list[Tensor | None] = [None] * grid.world_size
        for each in matrices:
            if each.own is not None and self._gives(grid.rank, each):
                number, fragment = each.own
                sent[each.owner] = fragment.of(flats[number].view(-1))
        sizes = [0] * grid.world_size
        if mine is not None:
            for rank in range(grid.world_size):
                if self._gives(rank, mine):
                    sizes[rank] = _length(self._piece(rank, mine))
        received = _exchange(sent, sizes, dtype)
        back: list[Tensor | None] = [None] * grid.world_size
        if mine is not None:
            result = function(mine.name, self._whole(mine, received, dtype)).to(dtype)
            shards = list(self._shards(mine.name, result))
            for rank in range(grid.world_size):
                piece = self._piece(rank, mine)
                back[rank] = shards[rank % grid.tensor_size][piece.start : piece.stop]
        sizes = [0] * grid.world_size
        for each in matrices:
            sizes[each.owner] = _length(self._piece(grid.rank, each))
        returned = _exchange(back, sizes, dtype)
        for each in matrices:
            if each.own is not None:
                number, fragment = each.own
                fragment.of(flats[number].view(-1)).copy_(returned[each.owner])

    def _gives(self, rank: int, matrix: _Matrix) -> bool:
        """Whether a rank sends its piece; of equal ones, those nearest to the owner's do."""
        size, owner = self._grid.tensor_size, matrix.owner
        if self._stage == 0 and rank // size != owner // size:
            return False
        return self._layouts[matrix.name].dim is not None or rank % size == owner % size

    def _piece(self, rank: int, matrix: _Matrix) -> Piece:
        return matrix.pieces[rank // self._grid.tensor_size]

    def _whole(self, matrix: _Matrix, received: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        layout, size = self._layouts[matrix.name], self._grid.tensor_size
        shape = layout.shard_shape(size)
        shards = []
        for tensor_rank in range(size):
            givers = range(tensor_rank, self._grid.world_size, size)
            parts = [received[r] for r in givers if self._gives(r, matrix)]
            if parts:
                shards.append(torch.cat(parts).view(shape))
        return layout.unshard(shards, size)

    def _shards(self, name: str, whole: Tensor) -> Iterator[Tensor]:
        layout, size = self._layouts[name], self._grid.tensor_size
        for rank in range(size):
            yield layout.shard(whole, rank, size).view(-1)


def _length(piece: Piece) -> int:
    return piece.stop - piece.start


def _exchange(
    sent: Sequence[Tensor | None], sizes: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Send a flat tensor to each rank, and return the ones received, of so many elements."""
    none = torch.empty(0, dtype=dtype, device=device())
    parts = [none if each is None else each.to(device(), dtype) for each in sent]
    if len(parts) == 1:
        return tuple(parts)
    received = torch.empty(sum(sizes), dtype=dtype, device=device())
    dist.all_to_all_single(received, torch.cat(parts), list(sizes), [len(each) for each in parts])
    returned: tuple[Tensor, ...] = received.split(list(sizes))
    return returned
