"""Read distributed checkpoints of Megatron-LM (--ckpt-format torch_dist).

DIR/iter_0000123/metadata.json       the format; written last
DIR/iter_0000123/common.pt           what all ranks share: arguments, iteration
DIR/iter_0000123/.metadata           tensors' shapes, and where their chunks are
DIR/iter_0000123/__0_0.distcp …      the chunks, in the form of torch.distributed.checkpoint

Tensors are those of the whole model, whatever the run's layout was. Those of all layers are stored
as one, `decoder.layers.mlp.linear_fc2.weight` [layers, …], or, with
--hetereogenous-dist-checkpoint, layer by layer.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megaphase.checkpoint.tensor_file import TensorKind
from megaphase.convert.megatron.distributed_metadata import (
    METADATA_FILE,
    read_metadata,
    stored_chunks,
)
from megaphase.convert.megatron.files import DTYPES, OTHER_CHECKPOINT
from megaphase.convert.megatron.names import MegatronParameter
from megaphase.convert.parameter_mapping import check_names
from megaphase.convert.safe_torch_load import check_archive, check_archive_in, damaged, load_pickle
from megaphase.utils.errors import InputError
from megaphase.utils.files import read_json
from megaphase.utils.progress import bytes_progress

_FORMAT_FILE = "metadata.json"
_COMMON_FILE = "common.pt"
_OF_TRAINING = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state")
_LAYER = re.compile(r"decoder\.layers\.(\d+\.)?")
_HALF = re.compile(r"(.*\.linear_fc1\.(?:weight|bias))_([wv])")  # gate, and what it multiplies


@dataclass(frozen=True)
class _Part:
    """A stored tensor, or a layer of one, that contains a parameter or some of its rows.

    Attributes:
        name: of the stored tensor.
        layer: its index along the first dimension, if all layers are stored as one.
        shape: of the part.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]


def is_distributed(folder: Path) -> bool:
    """Whether the folder of an iteration contains a distributed checkpoint of some format."""
    return any((folder / name).exists() for name in (METADATA_FILE, _COMMON_FILE))


class DistributedModel:
    """The weights of a distributed checkpoint; see `SavedModel`."""

    tensor = 1
    layout = "torch_dist: whole tensors"

    def __init__(self, folder: Path, *, trust_pickle: bool) -> None:
        """
        Args:
            folder: of an iteration.
            trust_pickle: see `load_pickle`.

        Raises:
            InputError: a file is missing or damaged, or the format is another one.
        """
        _check_format(folder / _FORMAT_FILE)
        self.folder = folder
        self.path = folder / _COMMON_FILE
        if not self.path.is_file():
            raise InputError(self.path, "is missing", OTHER_CHECKPOINT)
        check_archive(self.path)
        common = load_pickle(self.path, trust=trust_pickle)
        if not isinstance(common, dict) or not isinstance(common.get("args"), Namespace):
            raise InputError(
                self.path, "has no args, which tell what model it is", OTHER_CHECKPOINT
            )
        self.args: Namespace = common["args"]
        self.iteration: Any = common.get("iteration", 0)
        self._metadata = read_metadata(folder, trust_pickle=trust_pickle)
        try:
            self._parts, dtypes = _parts(self._metadata)
            self.kinds: Mapping[str, TensorKind] = {
                name: TensorKind(dtypes[name], _joined_shape(parts))
                for name, parts in self._parts.items()
            }
        except (AttributeError, IndexError, TypeError, ValueError):
            raise damaged(folder / METADATA_FILE) from None
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def check(self, parameters: Collection[MegatronParameter]) -> None:
        """Compare names and shapes, and check that all chunks are there; see `SavedModel`."""
        path = self.folder / METADATA_FILE
        wanted = {each.name: each.layout.padded_shape() for each in parameters}
        check_names(path, wanted, self.kinds)
        for name, shape in wanted.items():
            kind = self.kinds[name]
            if kind.shape != shape:
                problem = f"{name} has the shape {list(kind.shape)}, its args want {list(shape)}"
                raise InputError(path, problem, OTHER_CHECKPOINT)
            if kind.dtype not in DTYPES:
                raise InputError(path, f"{name} is {kind.dtype}, not a weight", OTHER_CHECKPOINT)
        stored_chunks(self._metadata, self._stored(), self.folder)

    def read(self, parameter: MegatronParameter) -> Tensor:
        """Read a parameter from all chunks of it; see `SavedModel`."""
        shape = parameter.layout.shape  # without padding rows, which are not read
        whole = torch.empty(shape)
        done = 0
        for part in self._parts[parameter.name]:
            rows = min(part.shape[0], shape[0] - done)
            self._read_part(part, whole.narrow(0, done, rows))
            done += rows
        return whole

    def verify(self, console: Console | None) -> int:
        """Compare the checksums that torch has stored with the chunks; see `SavedModel`."""
        chunks = stored_chunks(self._metadata, self._stored(), self.folder)
        total = sum(chunk.length for chunk in chunks)
        with bytes_progress(console, "verifying", total) as advance:
            for chunk in sorted(chunks, key=lambda each: (each.relative_path, each.offset)):
                path = self.folder / chunk.relative_path
                check_archive_in(path, chunk.offset, chunk.length, advance)
        return 1 + len({chunk.relative_path for chunk in chunks})

    def _stored(self) -> list[str]:
        return sorted({part.name for parts in self._parts.values() for part in parts})

    def _read_part(self, part: _Part, target: Tensor) -> None:
        """target: of the part's shape, or its first rows; filled."""
        first = (0,) * target.dim()
        if part.layer is not None:
            target, first = target[None], (part.layer, *first)
        wanted = ChunkStorageMetadata(torch.Size(first), target.shape)
        stored = self._metadata.state_dict_metadata[part.name]
        assert isinstance(stored, TensorStorageMetadata)
        planner = _Planner(target)
        for item in create_read_items_for_chunk_list(part.name, stored, [wanted]):
            index = MetadataIndex(part.name, item.storage_index.offset)
            path = self.folder / self._metadata.storage_data[index].relative_path
            try:
                self._reader.read_data(LoadPlan([item]), planner).wait()
            except Exception:  # whatever a damaged file makes of the reader
                raise damaged(path) from None


class _Planner(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the slice of the tensor that an item fills."""
        target = self._target
        for dim, (first, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, first, length)
        return target


def _check_format(path: Path) -> None:
    """Reject another format than torch_dist, and what was not saved to the end."""
    if not path.is_file():
        raise InputError(
            path,
            "is missing: the checkpoint is not complete, or not of the format torch_dist",
            "let Megatron-LM save it with --ckpt-format torch_dist",
        )
    try:
        backend = read_json(path)["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(path, "is damaged", OTHER_CHECKPOINT) from None
    if backend != "torch_dist":
        raise InputError(
            path,
            f"names the format {backend}, and only torch_dist can be read",
            "let Megatron-LM save it with --ckpt-format torch_dist",
        )


def _parts(metadata: Metadata) -> tuple[dict[str, list[_Part]], dict[str, torch.dtype]]:
    """The parts of every parameter, in their order, and its precision."""
    found: dict[str, list[_Part]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for stored_name, stored in sorted(metadata.state_dict_metadata.items()):
        if not isinstance(stored, TensorStorageMetadata) or _OF_TRAINING.match(stored_name):
            continue
        half = _HALF.fullmatch(stored_name)
        name = half[1] if half else stored_name
        match = _LAYER.match(name)
        shape = tuple(stored.size)
        layers = range(shape[0]) if match and not match[1] else [None]
        for layer in layers:
            own, part = name, _Part(stored_name, layer, shape)
            if match and layer is not None:
                own = f"{match[0]}{layer}.{name[match.end() :]}"
                part = _Part(stored_name, layer, shape[1:])
            parts = found.setdefault(own, [])
            # Names come in alphabetical order, so that the gate, `_w`, comes second.
            parts.insert(0 if half else len(parts), part)
            dtypes[own] = stored.properties.dtype
    return found, dtypes


def _joined_shape(parts: list[_Part]) -> tuple[int, ...]:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) != 1:
        raise ValueError("parts of different widths")
    return sum(part.shape[0] for part in parts), *shapes.pop()
