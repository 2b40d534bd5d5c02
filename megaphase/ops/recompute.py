"""Tensors that autograd recomputes in the backward pass rather than saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_ATTRIBUTE = "recomputed_by"


def recomputable(tensor: Tensor, recompute: Callable[[], Tensor]) -> Tensor:
    """Return the tensor, marked so that operations within `saves_recompute_of` do not save it.

    recompute: recomputes the tensor; called in the backward pass, without autograd, once for each
        operation that needs it.
    """
    setattr(tensor, _ATTRIBUTE, recompute)
    return tensor


@contextmanager
def saves_recompute_of(tensor: Tensor) -> Iterator[None]:
    """Within, autograd saves a recompute closure instead of `tensor` if that is `recomputable`."""
    recompute = cast(Callable[[], Tensor] | None, getattr(tensor, _ATTRIBUTE, None))
    if recompute is None:
        yield
        return

    # Not the tensor itself, which the saved closures would keep alive.
    address, numel = tensor.data_ptr(), tensor.numel()

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        # Operations also save views; a view of the whole tensor is a view of the recomputed one.
        if saved.data_ptr() != address or saved.numel() != numel:
            return saved
        size, stride = saved.size(), saved.stride()
        return lambda: recompute().as_strided(size, stride)

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with saved_tensors_hooks(pack, unpack):
        yield
