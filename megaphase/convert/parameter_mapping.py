"""How another program names and cuts the parameters of ours that are whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from megaphase.utils.errors import InputError


@dataclass(frozen=True)
class ParameterMapping:
    """A parameter of ours, and the tensors as which another program stores it.

    Attributes:
        ours: its name in the model.
        theirs: their names, in the order in which our rows are cut into them.
        rows: of each, along our first dimension.
        transposed: whether they are stored as [inputs, outputs].
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool = False

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """Their tensors, views of ours."""
        parts = whole.split(list(self.rows))
        return {n: p.t() if self.transposed else p for n, p in zip(self.theirs, parts, strict=True)}

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        """Ours, contiguous, from theirs, of which one at a time is in memory."""
        if len(self.theirs) == 1:
            return self._ours_from(read(self.theirs[0])).contiguous()
        joined = None
        end = 0
        for name, rows in zip(self.theirs, self.rows, strict=True):
            part = self._ours_from(read(name))
            if joined is None:
                joined = part.new_empty((sum(self.rows), *part.shape[1:]))
            joined[end : end + rows] = part
            end += rows
        assert joined is not None
        return joined

    def _ours_from(self, theirs: Tensor) -> Tensor:
        return theirs.t() if self.transposed else theirs

    def their_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """By name; shape: of ours."""
        shapes = [(rows, *shape[1:]) for rows in self.rows]
        if self.transposed:
            shapes = [tuple(reversed(each)) for each in shapes]
        return dict(zip(self.theirs, shapes, strict=True))


def check_names(
    where: object, wanted: Iterable[str], found: Iterable[str], ignored: Iterable[str] = ()
) -> None:
    """Refuse files that lack a tensor, or have one that the model has no place for.

    Raises:
        InputError: naming the first one.
    """
    wanted, found = set(wanted), set(found) - set(ignored)
    for name in sorted(wanted - found):
        raise InputError(where, f"has no tensor {name}", "use another checkpoint")
    for name in sorted(found - wanted):
        raise InputError(where, f"the model has no place for {name}", "use another checkpoint")
