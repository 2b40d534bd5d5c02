"""Write files for torch.load tensor by tensor; torch.save needs all tensors in memory.

The format (torch/serialization.py): a zip archive without compression, in which `data.pkl` is a
pickle whose tensors refer to the records `data/0`, `data/1` and so on, with the bytes of one each.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphase.checkpoint.hashed_file import WriteBehind
from megaphase.checkpoint.tensor_file import TensorKind, memory_chunks

_FOLDER = "archive"
_PROTOCOL = 2  # the only one that torch.load(weights_only=True) knows
_ALIGNMENT = 64  # where tensors begin in a file, so that it may be mapped into memory
_LOCAL_HEADER_BYTES = 30
_ZIP64_BYTES = 20
_EXTRA_HEADER_BYTES = 4
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


class TorchFileWriter:
    """Writes a file whose tensors follow one after another, in parts of any size."""

    def __init__(self, path: Path, content: Any) -> None:
        """
        Args:
                content: containers and values that pickle supports, with a distinct TensorKind in
                    place of every tensor; the tensors are written in the same order.
        """
        self._file = open(path, "wb")  # noqa: SIM115
        self._to_disk = WriteBehind(self._file.fileno())
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        pickled = io.BytesIO()
        pickler = _Pickler(pickled, _PROTOCOL)
        pickler.dump(content)
        self._sizes = [kind.nbytes for kind in pickler.kinds]
        self._written = 0
        self._record: Any = None
        self._left = 0
        try:
            for name, text in (("data.pkl", pickled.getvalue()), ("byteorder", b"little")):
                self._archive.writestr(f"{_FOLDER}/{name}", text)
        except BaseException:
            self.abandon()
            raise

    def write(self, part: Tensor) -> None:
        """Write the next elements of the next tensor: contiguous, on the CPU, of the announced
        dtype."""
        if self._record is None:
            self._record, self._left = self._begin_record(), self._sizes[self._written]
        for chunk in memory_chunks(part):
            self._record.write(chunk)
            self._to_disk.reached(self._file.tell())
        self._left -= part.nbytes
        assert self._left >= 0, "a tensor has more elements than were announced"
        if not self._left:
            self._record.close()
            self._record, self._written = None, self._written + 1

    def close(self) -> None:
        """Flush the file to disk and close it."""
        assert self._written == len(self._sizes), "fewer tensors were written than announced"
        self._archive.writestr(f"{_FOLDER}/version", b"3\n")
        self._archive.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is, even if it cannot be written any more."""
        if self._archive.fp is None:
            return  # it is closed
        # What the archive still writes, here or when it is collected, goes nowhere.
        self._archive.fp = io.BytesIO()
        if self._record is not None:
            self._record.close()
        self._archive.close()
        with suppress(OSError):
            self._file.close()

    def _begin_record(self) -> Any:
        info = zipfile.ZipInfo(f"{_FOLDER}/data/{self._written}")
        fixed = _LOCAL_HEADER_BYTES + len(info.filename) + _ZIP64_BYTES + _EXTRA_HEADER_BYTES
        padding = -(self._file.tell() + fixed) % _ALIGNMENT
        # An extra field of torch's own kind, `FB`, whose content is ignored.
        info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        return self._archive.open(info, "w", force_zip64=True)


class _Pickler(pickle.Pickler):
    """Pickles a TensorKind as a tensor of its dtype and shape; `kinds` are those met so far."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.kinds: list[TensorKind] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, TensorKind):
            return NotImplemented
        strides = torch.empty(value.shape, device="meta").stride()
        storage = _Storage(str(len(self.kinds)), value)
        self.kinds.append(value)
        no_hooks: OrderedDict[str, object] = OrderedDict()
        rebuilt = (storage, 0, value.shape, strides, False, no_hooks)
        return torch._utils._rebuild_tensor_v2, rebuilt

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return "storage", _STORAGES[value.kind.dtype], value.key, "cpu", value.kind.numel


class _Storage:
    """The bytes of a tensor, which are in the record `key`."""

    def __init__(self, key: str, kind: TensorKind) -> None:
        self.key, self.kind = key, kind
