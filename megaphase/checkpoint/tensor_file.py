"""safetensors files, hashed while they are written in one pass, and read in ranges of elements.

The format: https://github.com/huggingface/safetensors#format. The package's own writer takes all
tensors at once, copies them, and the file would have to be read again for the hash; its reader maps
files into memory, where every page read counts as the process's memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megaphase.checkpoint.hashed_file import Bytes, CachedFile, DirectFile, HashedFile
from megaphase.checkpoint.hashed_reading import HashedReading, Place
from megaphase.utils.errors import InputError

_CHUNK_BYTES = 1 << 20
_LEAST_DIRECT_BYTES = 1 << 24
_ALIGNMENT = 8
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in _TYPES.items()}


@dataclass(frozen=True)
class TensorKind:
    """The dtype and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorWriter:
    """Writes the tensors of a file in the announced order, in parts of any size."""

    def __init__(
        self,
        path: Path,
        kinds: Mapping[str, TensorKind],
        metadata: Mapping[str, str] | None = None,
        *,
        direct: bool = False,
    ) -> None:
        """direct: write past the page cache, unless the file is small."""
        self._left = sum(kind.nbytes for kind in kinds.values())
        past_cache = direct and self._left >= _LEAST_DIRECT_BYTES
        self._file: HashedFile = DirectFile(path) if past_cache else CachedFile(path)
        self._file.write(np.frombuffer(header_bytes(kinds, metadata), np.uint8))

    def write(self, part: Tensor) -> None:
        """Write the next elements: contiguous, on the CPU, of the announced dtype."""
        self._left -= part.nbytes
        self._file.write(_memory(part))

    def close(self) -> dict[str, Any]:
        """Flush the file to disk and return its manifest entry, `bytes` and `hash`."""
        assert self._left == 0, "not all announced tensors were written"
        return self._file.close()

    def abandon(self) -> None:
        """Close the file without completing it."""
        self._file.abandon()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write contiguous CPU tensors to a file and flush it to disk.

    Returns the file's manifest entry, `bytes` and `hash`.
    """
    writer = TensorWriter(path, _kinds(tensors), metadata)
    try:
        for tensor in tensors.values():
            writer.write(tensor)
        return writer.close()
    except BaseException:
        writer.abandon()
        raise


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the approximate size in bytes of the file that `write_tensors` writes."""
    return len(header_bytes(_kinds(tensors))) + sum(each.nbytes for each in tensors.values())


class TensorFile:
    """A safetensors file from which any number of threads may read ranges of elements.

    Attributes:
        kinds: dtype and shape of every tensor in it.
        metadata: the strings that its writer stored with them.
        hashing: reads the tensors that are read in the order of the file, if it is set.
    """

    hashing: HashedReading | None = None

    def __init__(self, path: Path) -> None:
        """
        Raises:
            InputError: there is no such file, or it is not a whole safetensors file.
        """
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            raise InputError(path, "is missing", "use another checkpoint") from None
        except OSError as error:
            raise InputError(path, f"cannot be read ({error.strerror})") from None
        try:
            described, self._begin = self._read_header()
            self.metadata: dict[str, str] = described.pop(_METADATA, {})
            self._offsets = {name: each["data_offsets"][0] for name, each in described.items()}
            _refuse_unknown_type(path, described)
            self.kinds = {name: _kind_of(each) for name, each in described.items()}
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            self._file.close()
            raise InputError(
                path, "is truncated, or not a safetensors file", "use another checkpoint"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read elements from `start` on of a flattened tensor, as many as `out` has, of the same
        dtype."""
        kind = self.kinds[name]
        assert kind.dtype == out.dtype, f"{name} is {kind.dtype}"
        assert start + out.numel() <= kind.numel, f"{name} has {kind.numel} elements"
        offset = self._begin + self._offsets[name] + start * kind.dtype.itemsize
        if self.hashing is not None and self.hashing.wait_for(name, offset):
            self.hashing.read_into(_memory(out))
            return
        for chunk in memory_chunks(out):
            while chunk:
                got = os.preadv(self._file.fileno(), [chunk], offset)
                if got == 0:
                    raise InputError(self.path, "is truncated", "use another checkpoint")
                offset, chunk = offset + got, chunk[got:]

    def place(self, name: str, turn: int) -> Place:
        """Return where a tensor is in the file."""
        begin = self._begin + self._offsets[name]
        return Place(name, begin, begin + self.kinds[name].nbytes, turn)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        kind = self.kinds[name]
        out = torch.empty(kind.shape, dtype=kind.dtype)
        self.read_into(name, 0, out)
        return out

    def _read_header(self) -> tuple[dict[str, Any], int]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("the header is longer than the file")
        described = json.loads(os.pread(self._file.fileno(), length, 8))
        tensors = [each for name, each in described.items() if name != _METADATA]
        end = max((each["data_offsets"][1] for each in tensors), default=0)
        if 8 + length + end != size:
            raise ValueError("the file's size does not match its header")
        return described, 8 + length


def header_bytes(
    kinds: Mapping[str, TensorKind], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the header of a file whose tensors follow each other in this order."""
    described: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, kind in kinds.items():
        described[name] = {
            "dtype": _TYPES[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [offset, offset + kind.nbytes],
        }
        offset += kind.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, TensorKind]:
    return {name: TensorKind(each.dtype, tuple(each.shape)) for name, each in tensors.items()}


def _refuse_unknown_type(path: Path, described: Mapping[str, Mapping[str, Any]]) -> None:
    for name, each in described.items():
        if isinstance(each["dtype"], str) and each["dtype"] not in _DTYPES:
            problem = f"{name} has the type {each['dtype']}, which is not known here"
            raise InputError(path, problem, "use a checkpoint with another type")


def _kind_of(described: Mapping[str, Any]) -> TensorKind:
    kind = TensorKind(_DTYPES[described["dtype"]], tuple(described["shape"]))
    first, end = described["data_offsets"]
    if end - first != kind.nbytes:
        raise ValueError("a tensor's shape does not match its size")
    return kind


def memory_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the memory of a contiguous CPU tensor in chunks."""
    flat = memoryview(_memory(tensor))  # type: ignore[arg-type]
    for first in range(0, len(flat), _CHUNK_BYTES):
        yield flat[first : first + _CHUNK_BYTES]


def _memory(tensor: Tensor) -> Bytes:
    assert tensor.is_contiguous()
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
