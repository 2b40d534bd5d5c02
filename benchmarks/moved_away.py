"""Moves a process's tensors out of the GPU's memory and back, so that processes can take turns."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


class MovedAway:
    """The memory of all tensors of this process that `chosen` is true of.

    Tensors and their views stay the objects that they are: the memory below them is freed, and
    later replaced by other memory with the same content. No work may be under way.
    """

    def __init__(self, chosen: Callable[[Tensor], bool] = on_gpu) -> None:
        self._chosen = chosen
        self._kept: list[tuple[torch.UntypedStorage, Tensor]] = []

    def leave(self) -> int:
        """Copy their memory to the CPU's and free it; returns the bytes."""
        gc.collect()
        found = {}
        for each in gc.get_objects():
            # torch.compile leaves tensors behind that only describe others.
            if issubclass(type(each), FakeTensor) or not issubclass(type(each), Tensor):
                continue
            if self._chosen(each):
                gradient = each.grad if each.is_leaf else None
                for tensor in (each, gradient):
                    if tensor is not None and tensor.layout == torch.strided:
                        storage = tensor.untyped_storage()
                        found[storage.data_ptr()] = storage
        found.pop(0, None)  # without memory
        for storage in found.values():
            kept = torch.empty(storage.nbytes(), dtype=torch.uint8)
            kept.copy_(_bytes(storage))
            self._kept.append((storage, kept))
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return sum(kept.nbytes for _, kept in self._kept)

    def come_back(self) -> None:
        """Give them memory again, with what it held."""
        for storage, kept in self._kept:
            storage.resize_(kept.nbytes)
            _bytes(storage).copy_(kept)
        self._kept.clear()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
