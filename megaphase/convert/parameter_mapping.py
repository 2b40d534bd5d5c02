"""How another program names and splits the model's whole parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from megaphase.convert.qkv_order import deinterleaved, interleaved
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError


@dataclass(frozen=True)
class ParameterMapping:
    """A parameter of the model, and the tensors in which another program stores it.

    Attributes:
        name: the parameter's name in the model.
        foreign_names: the tensors' names, in the order in which the parameter's rows are split.
        rows: number of rows of each tensor, along the parameter's first dimension.
        transposed: whether the tensors are stored as [inputs, outputs].
        interleaved: the model's shape where rows of queries, keys and values follow each other
            group by group, see `convert.qkv_order`.
    """

    name: str
    foreign_names: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool = False
    interleaved: GPTShape | None = None

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """Return the other program's tensors, as views of the parameter or of its reordered
        copy."""
        if self.interleaved is not None:
            whole = interleaved(whole, self.interleaved)
        parts = whole.split(list(self.rows))
        named = zip(self.foreign_names, parts, strict=True)
        return {name: part.t() if self.transposed else part for name, part in named}

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return the parameter, contiguous; only one of the other tensors is in memory at a
        time."""
        if len(self.foreign_names) == 1:
            whole = self._from_foreign(read(self.foreign_names[0])).contiguous()
            return whole if self.interleaved is None else deinterleaved(whole, self.interleaved)
        joined = None
        end = 0
        for name, rows in zip(self.foreign_names, self.rows, strict=True):
            part = self._from_foreign(read(name))
            if joined is None:
                joined = part.new_empty((sum(self.rows), *part.shape[1:]))
            joined[end : end + rows] = part
            end += rows
        assert joined is not None
        return joined

    def _from_foreign(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed else tensor

    def foreign_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the other tensors' shapes by name; shape: of the parameter."""
        shapes = [(rows, *shape[1:]) for rows in self.rows]
        if self.transposed:
            shapes = [tuple(reversed(each)) for each in shapes]
        return dict(zip(self.foreign_names, shapes, strict=True))


def check_names(
    where: object, wanted: Iterable[str], found: Iterable[str], ignored: Iterable[str] = ()
) -> None:
    """Reject files that lack a tensor, or have one that does not belong to the model.

    Raises:
        InputError: names the first one.
    """
    wanted, found = set(wanted), set(found) - set(ignored)
    for name in sorted(wanted - found):
        raise InputError(where, f"has no tensor {name}", "use another checkpoint")
    for name in sorted(found - wanted):
        raise InputError(where, f"the model has no place for {name}", "use another checkpoint")
