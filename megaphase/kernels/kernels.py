"""Which kernels compute the parts of a block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Kernels:
    """How a model computes what is no matrix product.

    compiled: every formula is one kernel that torch.compile makes, rather than a few operations.
    apex_norm: norms by NVIDIA apex.
    """

    compiled: bool = False
    apex_norm: bool = False

    def of(self, formula: Callable[P, R]) -> Callable[P, R]:
        """What computes a formula: a function of tensors without any state or autograd."""
        return _compiled(formula) if self.compiled else formula


EAGER = Kernels()


@functools.cache
def _compiled(formula: Callable[P, R]) -> Callable[P, R]:
    # Every shape has a kernel of its own. One for all shapes would be made once a second shape is
    # seen, and a run that goes on, which sees them in another order, would differ in the last bit.
    return torch.compile(formula, dynamic=False, fullgraph=True)
