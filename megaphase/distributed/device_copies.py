"""Copies between the CPU and the device that neither of them waits for."""

from __future__ import annotations

import torch
from torch import Tensor

from megaphase.distributed.process_grid import device


def to_device(values: Tensor, target: torch.device | None = None) -> Tensor:
    """Values of the CPU on a device, by default this process's; pinned first where they are not."""
    target = device() if target is None else target
    if target.type == "cuda" and not values.is_cuda and not values.is_pinned():
        values = values.pin_memory()
    return values.to(target, non_blocking=True)


class Readout:
    """Values of the device, on their way to the CPU while the device computes what follows."""

    def __init__(self, values: Tensor) -> None:
        self._done = None
        if values.is_cuda:
            copy = torch.empty(values.shape, dtype=values.dtype).pin_memory()
            values = copy.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        self._values = values

    def read(self) -> Tensor:
        """The values on the CPU; waits if the device has not computed them yet."""
        if self._done is not None and not self._done.query():
            self._done.synchronize()
        return self._values
