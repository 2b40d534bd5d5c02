"""The order in which the rows of activations are stored.

Activations are [batch, seq, features]. With sequence parallelism those of the residual stream and
of the products are stored sequence first, [seq, batch, features]: then the parts of all ranks lie
one after the other, and collectives along the sequence copy nothing. Nothing depends on the order
but the number of copies.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def is_sequence_first(x: Tensor) -> bool:
    """Whether [batch, seq, ...] is stored as [seq, batch, ...] without gaps."""
    return x.dim() > 2 and not x.is_contiguous() and x.transpose(0, 1).is_contiguous()


def sequence_first(x: Tensor) -> Tensor:
    """[batch, seq, ...] stored sequence first; copied if it is not."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def stored_order(x: Tensor) -> Callable[[Tensor], Tensor]:
    """The view of tensors [batch, seq, ...] whose rows are in the order in which x stores them.

    Applied twice it gives the tensor itself.
    """
    return _transposed if is_sequence_first(x) else _same


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _same(x: Tensor) -> Tensor:
    return x
