"""Read the file .metadata of torch.distributed.checkpoint, and check that it describes whole
tensors."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch.distributed._shard.sharded_tensor import metadata as earlier
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

from megaphase.convert.safe_torch_load import damaged, load_bare_pickle
from megaphase.utils.errors import InputError

METADATA_FILE = ".metadata"
_OTHER_CHECKPOINT = "use another checkpoint"
_ALLOWED = (
    *(Metadata, TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex),
    *(StorageMeta, TensorProperties, _MEM_FORMAT_ENCODING, _StorageInfo, torch.Size, _get_layout),
    *(earlier.TensorProperties, earlier.MEM_FORMAT_ENCODING, OrderedDict, set, slice),
)


def read_metadata(folder: Path, *, trust_pickle: bool) -> Metadata:
    """Return the description of a distributed checkpoint.

    trust_pickle: see `load_pickle`.

    Raises:
        InputError: .metadata is missing, damaged, or contains other objects and is not trusted.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        raise InputError(path, "is missing", _OTHER_CHECKPOINT)
    metadata = load_bare_pickle(path, _ALLOWED, trust=trust_pickle)
    if (
        not isinstance(metadata, Metadata)
        or not isinstance(metadata.state_dict_metadata, dict)
        or not all(isinstance(name, str) for name in metadata.state_dict_metadata)
        or not isinstance(metadata.storage_data, dict)
    ):
        raise damaged(path)
    return metadata


def stored_chunks(metadata: Metadata, names: Collection[str], folder: Path) -> list[_StorageInfo]:
    """Return where the chunks of these tensors are, after checking that they are all there.

    Raises:
        InputError: a tensor's chunks do not cover it, each element once; a file is missing or too
            short; or two chunks have the same place.
    """
    path = folder / METADATA_FILE
    places: dict[tuple[str, int], str] = {}
    found = []
    try:
        for name in names:
            tensor = metadata.state_dict_metadata[name]
            if not isinstance(tensor, TensorStorageMetadata) or not _covered(tensor):
                raise InputError(path, f"does not cover {name} with chunks", _OTHER_CHECKPOINT)
            for chunk in tensor.chunks:
                info = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                if places.setdefault((info.relative_path, info.offset), name) != name:
                    other = places[info.relative_path, info.offset]
                    problem = f"gives {name} and {other} the same place"
                    raise InputError(path, problem, _OTHER_CHECKPOINT)
                _check_file(folder, info)
                found.append(info)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise damaged(path) from None
    if len(places) != len(found):
        raise damaged(path)
    return found


def _check_file(folder: Path, info: _StorageInfo) -> None:
    if Path(info.relative_path).name != info.relative_path:
        raise InputError(
            folder / METADATA_FILE, f"names {info.relative_path}, elsewhere", _OTHER_CHECKPOINT
        )
    if getattr(info, "transform_descriptors", None):
        raise InputError(folder / info.relative_path, "is compressed", _OTHER_CHECKPOINT)
    path = folder / info.relative_path
    if not path.is_file():
        raise InputError(path, "is missing", _OTHER_CHECKPOINT)
    if info.offset < 0 or info.length <= 0 or info.offset + info.length > path.stat().st_size:
        raise InputError(path, f"ends before byte {info.offset + info.length}", _OTHER_CHECKPOINT)


def _covered(tensor: TensorStorageMetadata) -> bool:
    """Whether the chunks contain each element once."""
    shape = tuple(tensor.size)
    boxes = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks)
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(shape):
        return False
    return all(_inside(box, shape) for box in boxes) and not any(_overlaps(boxes))


def _inside(box: tuple[tuple[int, ...], tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    return all(
        first >= 0 and size > 0 and first + size <= whole
        for first, size, whole in zip(*box, shape, strict=True)
    )


def _overlaps(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Iterator[bool]:
    """boxes: sorted by their offsets."""
    for number, (first, sizes) in enumerate(boxes):
        for other, other_sizes in boxes[number + 1 :]:
            if other and other[0] >= first[0] + sizes[0]:
                break
            yield all(
                one < two + two_size and two < one + one_size
                for one, one_size, two, two_size in zip(
                    first, sizes, other, other_sizes, strict=True
                )
            )
