"""Common code of all conversions: whole parameters are read one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from megaphase.checkpoint.parameters import Kinds, kinds_of
from megaphase.distributed.sharding import ParameterLayout
from megaphase.model.parameters import parameter_count, parameter_layouts
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError

# This many bytes may wait in memory even if every parameter is smaller.
_ALWAYS_ALLOWED = 1 << 26
FP32_BYTES = 4


def fp32_bytes(shape: GPTShape) -> int:
    """Return the size of all weights of a model in fp32, in bytes."""
    return FP32_BYTES * parameter_count(shape)


class Weights(Protocol):
    """Parameters of a GPT by the model's names, from any files.

    Attributes:
        layouts: of all parameters, in the model's order.
    """

    @property
    def layouts(self) -> Mapping[str, ParameterLayout]: ...

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a parameter, fp32, contiguous, in its layout's shape; called by several
        threads."""
        ...


class WithZeroBiases:
    """Weights for a shape with biases, from weights that may have none."""

    def __init__(self, weights: Weights, shape: GPTShape) -> None:
        self.layouts = parameter_layouts(shape, 1)
        self._weights = weights

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a parameter, fp32, contiguous."""
        if name in self._weights.layouts:
            return self._weights.whole(name, kind)
        return torch.zeros(self.layouts[name].shape)


def as_dtype(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in the dtype in which it is to be stored.

    Raises:
        InputError: fp16 cannot hold one of its values.
    """
    stored = weight.to(dtype)
    if dtype == torch.float16 and stored.isinf().any():
        raise InputError(name, "has values that fp16 cannot hold", "choose --dtype bf16")
    return stored


def in_model_order(weights: Weights, kinds: Kinds) -> list[tuple[str, str]]:
    """Return all names and kinds, in the order of the model's parameters."""
    return [(name, kind) for name in weights.layouts for kind in kinds_of(kinds, name)]


def read_each(
    weights: Weights,
    wanted: Sequence[tuple[str, str]],
    take: Callable[[str, str, Tensor], object],
    *,
    workers: int,
) -> None:
    """Call take(name, kind, whole parameter) for names and kinds, in this order.

    Several are read at a time. The parameters that are read but not yet processed take together no
    more memory than the largest parameter (or a few megabytes).
    """
    sizes = {name: FP32_BYTES * layout.numel for name, layout in weights.layouts.items()}
    allowed = max(*sizes.values(), _ALWAYS_ALLOWED)
    reading: deque[Future[Tensor]] = deque()
    held = begun = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="reader") as readers:
        try:
            for name, kind in wanted:
                while begun < len(wanted):
                    following = wanted[begun]
                    if reading and held + sizes[following[0]] > allowed:
                        break
                    reading.append(readers.submit(weights.whole, *following))
                    held, begun = held + sizes[following[0]], begun + 1
                take(name, kind, reading[0].result())
                reading.popleft()
                held -= sizes[name]
        finally:
            for each in reading:
                each.cancel()
