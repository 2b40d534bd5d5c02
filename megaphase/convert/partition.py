"""The elements of every parameter on each rank of a layout, as DeepSpeed's ZeRO partitions them.

Tested against the trainer's own checkpoints on every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megaphase.checkpoint.parameters import Piece, Shard
from megaphase.checkpoint.state import ADAMW
from megaphase.distributed.parameter_spec import ParameterSpec
from megaphase.model.shape import GPTShape
from megaphase.optim.parameter_state import config_stored_by, groups_of
from megaphase.utils.errors import InputError

# ZeRO 1 and 2 pad the flat tensor of a group to a multiple of this many elements per rank.
_FLAT_ALIGNMENT = 2


@dataclass(frozen=True)
class Layout:
    """Processes that share a model: tensor × data of them, under a ZeRO stage."""

    tensor: int
    data: int
    zero: int

    @property
    def processes(self) -> int:
        return self.tensor * self.data


def check_tensor_size(shape: GPTShape, tensor: int) -> None:
    """Reject a tensor-parallel size by which a model cannot be split.

    Raises:
        InputError: names the size that it does not divide.
    """
    sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "ffn": shape.ffn}
    for key, size in sizes.items():
        if size % tensor:
            raise InputError(
                f"--tensor {tensor}",
                f"does not divide the model's {key}, {size}",
                "choose another one",
            )


def shards_of(
    specs: Mapping[str, ParameterSpec], layout: Layout, optimizer: str = ADAMW
) -> list[Shard]:
    """Return the shard that every rank writes, in the order of ranks.

    specs: in the model's order. optimizer: as in a checkpoint's state.
    """
    groups = [group.names for group in groups_of(config_stored_by(optimizer), specs)]
    by_data_rank = [_pieces(specs, groups, rank, layout) for rank in range(layout.data)]
    # Neighbouring ranks form a tensor-parallel group. Pieces of parameters that are not split are
    # written by the first of them.
    return [
        Shard(rank, {n: p for n, p in pieces.items() if rank == 0 or specs[n].dim is not None})
        for pieces in by_data_rank
        for rank in range(layout.tensor)
    ]


def _pieces(
    specs: Mapping[str, ParameterSpec],
    groups: Sequence[Sequence[str]],
    rank: int,
    layout: Layout,
) -> dict[str, Piece]:
    sizes = {n: each.layout(layout.tensor).shard_numel(layout.tensor) for n, each in specs.items()}
    if layout.zero == 0:
        return {name: Piece(0, size) for name, size in sizes.items()} if rank == 0 else {}
    if layout.zero == 3:
        pieces = _of_each(sizes, rank, layout.data)
    else:
        pieces = _of_flat_groups(groups, sizes, rank, layout.data)
    return {name: piece for name, piece in pieces if piece.start < piece.stop}


def _of_each(sizes: Mapping[str, int], rank: int, ranks: int) -> Iterator[tuple[str, Piece]]:
    """ZeRO-3: split every parameter into equal ranges, of which the last may be shorter."""
    for name, size in sizes.items():
        share = -(-size // ranks)
        yield name, Piece(min(rank * share, size), min((rank + 1) * share, size))


def _of_flat_groups(
    groups: Sequence[Sequence[str]], sizes: Mapping[str, int], rank: int, ranks: int
) -> Iterator[tuple[str, Piece]]:
    """ZeRO 1 and 2: concatenate the parameters of an optimizer group, then partition them."""
    for names in groups:
        group = {name: sizes[name] for name in names}
        unit = _FLAT_ALIGNMENT * ranks
        share = -(-sum(group.values()) // unit) * unit // ranks
        offset = 0
        for name, size in group.items():
            start, stop = (
                min(max(end - offset, 0), size) for end in (rank * share, (rank + 1) * share)
            )
            yield name, Piece(start, stop)
            offset += size
