"""Specifications of parameters: all that is known of them before any of them is built.

torch is not imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megaphase.distributed.sharding import ParameterLayout, padded_vocab

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Normal:
    """Initial values are drawn from N(0, std²)."""

    std: float


@dataclass(frozen=True)
class Constant:
    """All initial values are the same."""

    value: float


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a layer.

    Attributes:
        shape: of the whole parameter, without padding.
        init: of its initial values.
        weight_decay: whether it applies; the optimizer keeps such parameters in a group of their
            own.
        dim: along which tensor parallelism shards it; None where every rank holds all of it.
        segments: sizes along `dim` of the parts that are sharded separately (query, key and value,
            say); empty for the whole dimension.
        padded: whether `dim` is padded to a multiple of the tensor-parallel size, rather than
            required to be one.
        matrix: whether it multiplies the activations of every token within a layer, so that an
            optimizer of matrices may update it; each segment is a matrix of its own.
    """

    shape: tuple[int, ...]
    init: Normal | Constant
    weight_decay: bool = True
    dim: int | None = None
    segments: tuple[int, ...] = ()
    padded: bool = False
    matrix: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole parameter, without padding."""
        return math.prod(self.shape)

    def layout(self, tensor_size: int) -> ParameterLayout:
        """How it is sharded over so many tensor-parallel ranks."""
        if self.dim is None:
            return ParameterLayout(self.shape)
        length = self.shape[self.dim]
        if self.padded:
            return ParameterLayout(self.shape, self.dim, (padded_vocab(length, tensor_size),))
        return ParameterLayout(self.shape, self.dim, self.segments or (length,))


def spec_of(parameter: Tensor) -> ParameterSpec:
    """The specification that a parameter of the model was built from."""
    spec = parameter.parameter_spec  # type: ignore[attr-defined]
    assert isinstance(spec, ParameterSpec)
    return spec
