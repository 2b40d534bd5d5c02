"""The choice of kernels for the operations of a block."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

# Of torch's compiler, for GPUs; code for CPUs does not depend on them.
OPTIONS = {
    # Sums are not timed in several orders, of which every rank could choose another one: weights
    # that are replicated over ranks would drift apart by their rounding.
    "deterministic": True,
    # Sums over the rows and over the columns of one tensor take one pass whatever its size; whether
    # they should is decided where such sums are (ops/rms_norm.py).
    "triton.mix_order_reduction_non_strict_mode": True,
}

# Graphs of a function that torch may compile, after which it raises an error: for each rule and
# shape, which the phases of a run may have of their own, with documents and without, for training
# and for evaluation.
_MOST_GRAPHS = 256

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Kernels:
    """The kernels for all operations that are not matrix products.

    compiled: every formula is compiled by torch.compile, most to a single kernel, rather than
        computed operation by operation.
    apex_norm: norms by NVIDIA apex.
    """

    compiled: bool = False
    apex_norm: bool = False

    def of(self, formula: Callable[P, R]) -> Callable[P, R]:
        """Return the function that computes a formula of tensors, without state or autograd."""
        return _compiled(formula) if self.compiled else formula


EAGER = Kernels()


def _separate_caches() -> None:
    """Give every width of vector instructions its own cache of compiled code.

    torch's cache does not distinguish them: code generated for AVX-512 would be reused for AVX2 if
    the environment requests that (ATEN_CPU_CAPABILITY), and skip half of the values.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    default, capability = default_cache_dir(), torch.backends.cpu.get_cpu_capability()
    # torch sets the variable itself when it is first asked for the folder.
    if os.environ.get(CACHE_VARIABLE, default) == default:
        os.environ[CACHE_VARIABLE] = f"{default}-{capability}"


@functools.cache
def _compiled(formula: Callable[P, R]) -> Callable[P, R]:
    _separate_caches()
    allow_graphs()
    # Every shape has its own kernel. A kernel for all shapes would only be compiled when a second
    # shape is seen, and a resumed run, which sees them in another order, would differ in the last
    # bit.
    return torch.compile(formula, dynamic=False, fullgraph=True, options=dict(OPTIONS))


def allow_graphs() -> None:
    """Let torch compile a function for more shapes than the eight that are its default."""
    import torch._dynamo.config as limits

    limits.recompile_limit = max(limits.recompile_limit, _MOST_GRAPHS)
