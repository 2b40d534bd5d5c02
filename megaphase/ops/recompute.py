"""What autograd keeps of a tensor that is cheaply computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def recompute(tensor: Tensor, again: Callable[[], Tensor], chosen: bool) -> Iterator[None]:
    """Operations within keep, in place of `tensor`, only how to compute it again.

    tensor: lives as long as the context does.
    again: called in the backward pass, without autograd, once for each operation that keeps it.
    chosen: otherwise they keep what they are given.
    """
    if not chosen:
        yield
        return

    # Not the tensor itself, which the operations would hold on to with this function.
    place, numel = tensor.data_ptr(), tensor.numel()

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        # Operations keep views as well; those of the whole tensor are made again from the whole.
        if saved.data_ptr() != place or saved.numel() != numel:
            return saved
        size, stride = saved.size(), saved.stride()
        return lambda: again().as_strided(size, stride)

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with saved_tensors_hooks(pack, unpack):
        yield
