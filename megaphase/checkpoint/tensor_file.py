"""safetensors files, written in one pass that also hashes them, without a copy of the tensors.

The format: https://github.com/huggingface/safetensors#format. The package's own writer copies
every tensor and would have to read the file again for the hash; reading is left to the package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphase.files import new_hash, write_all

_CHUNK_BYTES = 1 << 24
_ALIGNMENT = 8
_TYPES = {torch.float32: "F32", torch.uint8: "U8"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write contiguous tensors on the CPU and force them to the disk.

    Returns what a manifest says of the file, its `bytes` and `hash`.
    """
    digest, size = new_hash(), 0
    with open(path, "wb", buffering=0) as file:
        for chunk in _chunks(tensors):
            write_all(file.fileno(), chunk)
            digest.update(chunk)
            size += len(chunk)
        os.fsync(file.fileno())
    return {"bytes": size, "hash": digest.hexdigest()}


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """About how many bytes `write_tensors` needs on the disk."""
    return len(_header(tensors)) + sum(each.nbytes for each in tensors.values())


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield _header(tensors)
    for tensor in tensors.values():
        flat = memoryview(tensor.detach().numpy().reshape(-1).view("u1"))  # type: ignore[arg-type]
        for first in range(0, len(flat), _CHUNK_BYTES):
            yield flat[first : first + _CHUNK_BYTES]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    described, offset = {}, 0
    for name, tensor in tensors.items():
        described[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
