"""Write weights from any source as a Megaphase checkpoint: for a layout, or in portable form.

The portable form is that of a single process, but with a file for every parameter, in which the
tensors keep their shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphase.checkpoint.parameters import (
    Kinds,
    Piece,
    Shard,
    factor_layout,
    has_factors,
    index_json,
    shard_file,
    tensor_name,
)
from megaphase.checkpoint.state import ADAMW
from megaphase.checkpoint.store import complete
from megaphase.checkpoint.tensor_file import TensorKind
from megaphase.convert.partition import Layout, shards_of
from megaphase.convert.tensor_files import TensorFiles
from megaphase.convert.weights import Weights, in_model_order, read_each
from megaphase.distributed.sharding import ParameterLayout
from megaphase.model.parameters import parameter_layouts, parameter_specs
from megaphase.model.shape import GPTShape

PORTABLE_FOLDER = "parameters"


@dataclass(frozen=True)
class Form:
    """The files of a checkpoint and their tensors.

    Attributes:
        tensor: the tensor-parallel size.
        layouts: how parameters are sharded for it.
        shards: by file.
        flat: whether tensors are one-dimensional; otherwise they have their parameter's shape.
        facts: the layout's entries in the checkpoint's state.
    """

    tensor: int
    layouts: Mapping[str, ParameterLayout]
    shards: Mapping[str, Shard]
    flat: bool
    facts: Mapping[str, Any]

    def contents(self, order: Sequence[tuple[str, str]]) -> dict[str, dict[str, TensorKind]]:
        """Return the tensors of every file; order: names and kinds as they are read."""
        found: dict[str, dict[str, TensorKind]] = {file: {} for file in self.shards}
        files = self.files_by_name()
        for name, kind in order:
            factor = factor_layout(kind, self.layouts[name])
            for file, rank, piece in files[name]:
                if factor is None:
                    shape = self._shape(name, piece)
                elif has_factors(rank, piece):
                    shape = factor.shape
                else:
                    continue
                found[file][tensor_name(kind, name)] = TensorKind(torch.float32, shape)
        return found

    def files_by_name(self) -> dict[str, list[tuple[str, int, Piece]]]:
        """Return for each parameter the files that hold a piece of it, their tensor-parallel ranks
        and the pieces."""
        files: dict[str, list[tuple[str, int, Piece]]] = {name: [] for name in self.layouts}
        for file, shard in self.shards.items():
            for name, piece in shard.pieces.items():
                files[name].append((file, shard.tensor_rank, piece))
        return files

    def _shape(self, name: str, piece: Piece) -> tuple[int, ...]:
        return (piece.stop - piece.start,) if self.flat else self.layouts[name].shape


def form_for(shape: GPTShape, layout: Layout, optimizer: str = ADAMW) -> Form:
    """Return the form with a file for every rank. optimizer: as in the checkpoint's state."""
    shards = shards_of(parameter_specs(shape), layout, optimizer)
    by_file = {shard_file(i): shard for i, shard in enumerate(shards)}
    facts = {"processes": layout.processes, "tensor": layout.tensor, "zero": layout.zero}
    return Form(layout.tensor, parameter_layouts(shape, layout.tensor), by_file, True, facts)


def portable_form(shape: GPTShape) -> Form:
    """Return the form with a file for every parameter."""
    layouts = parameter_layouts(shape, 1)
    shards = {
        f"{PORTABLE_FOLDER}/{name}.safetensors": Shard(0, {name: Piece(0, layout.numel)})
        for name, layout in layouts.items()
    }
    return Form(1, layouts, shards, False, {"processes": None, "tensor": 1, "zero": None})


def write_checkpoint(
    folder: Path,
    weights: Weights,
    kinds: Kinds,
    form: Form,
    state: Mapping[str, Any],
    *,
    order: Sequence[tuple[str, str]] | None = None,
    workers: int,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Write a whole checkpoint into an empty folder.

    Args:
        kinds: the kinds of tensors to write, of those that exist.
        order: all names and kinds in the order in which they are read, and follow each other in
            the files; the model's by default.
        state: the content of state.json without the layout.
        advance: called with the number of bytes written since the last call.
    """
    wanted = in_model_order(weights, kinds) if order is None else order
    files, places = TensorFiles(folder, form.contents(wanted)), form.files_by_name()

    def write(name: str, kind: str, whole: Tensor) -> None:
        if factor_layout(kind, form.layouts[name]) is not None:
            for file, rank, piece in places[name]:
                if has_factors(rank, piece):
                    files.write(file, whole)
            advance(whole.nbytes)
            return
        for rank in sorted({rank for _, rank, _ in places[name]}):
            cut = form.layouts[name].flat_shard(whole, rank, form.tensor)
            parts = [
                (file, list(_elements(cut, piece)))
                for file, at, piece in places[name]
                if at == rank
            ]
            list(writers.map(lambda part: files.write(part[0], *part[1]), parts))
            advance(sum(each.nbytes for each in cut))

    with ThreadPoolExecutor(workers, thread_name_prefix="writer") as writers:
        try:
            read_each(weights, wanted, write, workers=workers)
        finally:
            files.close()
    index = index_json(form.tensor, kinds, form.layouts, form.shards)
    complete(folder, index, {**state, **form.facts}, files.described)


def _elements(parts: Sequence[Tensor], piece: Piece) -> Iterator[Tensor]:
    """Yield a piece of consecutive flat tensors."""
    first = 0
    for part in parts:
        start, stop = max(piece.start - first, 0), min(piece.stop - first, part.numel())
        if start < stop:
            yield part[start:stop]
        first += part.numel()
