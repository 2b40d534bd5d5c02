"""Bytes and FLOPs of an operator, as if each were one kernel that touches every tensor once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

# Allocations, views and questions: nothing runs on the device.
NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "view",
                 "_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "is_pinned",
                 "record_stream", "set_", "resize_", "is_same_size", "_local_scalar_dense",
                 "_has_compatible_shallow_copy_type")
) | {"prim::device"}  # fmt: skip
# Operators that overwrite their first argument without reading it.
OVERWRITES = frozenset(
    f"aten::{name}"
    for name in ("zero_", "fill_", "copy_", "normal_", "uniform_", "_foreach_zero_",
                 "_foreach_copy_", "random_")
)  # fmt: skip
# Operators that take a tensor for its shape or type alone.
CREATES = frozenset(
    f"aten::{name}"
    for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
)


def tensor_bytes(x: Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension has one."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * x.element_size()


def distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(x): x for x in tensors}.values())


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator changes in place."""
    if not _written_positions(func):
        return []
    return [x for x in tree_leaves(list(_written(func, args, kwargs))) if isinstance(x, Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for position, name in _written_positions(func):
        if name in kwargs:
            yield kwargs[name]
        elif position < len(args):
            yield args[position]


@cache
def _written_positions(func: Any) -> list[tuple[int, str]]:
    return [
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


@cache
def is_view(func: Any) -> bool:
    """Whether an operator only returns views of its arguments."""
    returns = func._schema.returns
    return not _written_positions(func) and any(r.alias_info is not None for r in returns)


def bytes_moved(
    func: Any,
    tensors: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Sequence[Tensor],
) -> tuple[int, int]:
    """Bytes that an operator reads and writes. tensors: those among its arguments."""
    inputs = distinct(tensors)
    changed = distinct(written_arguments(func, args, kwargs))
    known = {id(x) for x in inputs}
    fresh = [x for x in distinct(outputs) if id(x) not in known]
    overwritten = changed if func._schema.name in OVERWRITES else []
    unread = {id(x) for x in [*overwritten, *tree_leaves(kwargs.get("out"))]}
    read = sum(tensor_bytes(x) for x in inputs if id(x) not in unread)
    if func._schema.name in CREATES:
        read = 0
    return read, sum(map(tensor_bytes, [*fresh, *changed]))


def product_flops(name: str, tensors: Sequence[Tensor]) -> int:
    """FLOPs of a matrix product; 0 for all else."""
    if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
        a, b = tensors[-2:]
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    if name in ("aten::bmm", "aten::baddbmm"):
        a, b = tensors[-2:]
        return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
    return 0
