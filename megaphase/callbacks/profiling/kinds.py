"""Classify kernels and operators by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum


class Kind(StrEnum):
    """The kinds of work of a device."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    OPTIMIZER = "optimizer"
    OTHER = "other"
    COMMUNICATION = "communication"


_LINEAR = "mkldnn::_linear_pointwise"  # the right matrix is [outputs, inputs]
# Operators that multiply matrices, each with the argument that is the left one.
_LEFT_MATRIX = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::_scaled_mm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "aten::baddbmm": 1,
    "aten::baddbmm_": 1,
    "aten::_addmm_activation": 1,
    _LINEAR: 0,
}

# torch puts this mark around the step of every optimizer.
OPTIMIZER_STEP = "Optimizer.step#"
# Kernels that torch.compile made for the CPU have no events of their own.
COMPILED_GRAPH = "## Call CompiledFxGraph"

_COLLECTIVES = ("c10d::", "_c10d_functional::")
_FRAMEWORK = ("autograd::", "torch::", "profiler::")

_ATTENTION_KERNEL = re.compile(r"flash|fmha|attention|attn|sdpa", re.IGNORECASE)
_MATMUL_KERNEL = re.compile(r"gemm|gemv|cutlass|cublas|nvjet|xmma|_mm_|splitk", re.IGNORECASE)
_OPTIMIZER_KERNEL = re.compile(r"adam", re.IGNORECASE)
# torch.compile names them after all operators around; only its templates (tem) multiply matrices.
_POINTWISE_KERNEL = re.compile(r"triton_(poi|red|per)_")
_NCCL_KERNEL = re.compile(r"nccl", re.IGNORECASE)

_NOISE = re.compile(r"^void |at::native::|\(anonymous namespace\)::|c10::|std::")


def kind_of_operator(name: str) -> Kind | None:
    """Of an operator or a mark on the host; None where it computes nothing by itself."""
    if name in _LEFT_MATRIX:
        return Kind.MATMUL
    if name.startswith(OPTIMIZER_STEP):
        return Kind.OPTIMIZER
    if name.startswith(COMPILED_GRAPH):
        return Kind.OTHER
    if "::" not in name or name.startswith(_FRAMEWORK):
        return None
    if name.startswith(_COLLECTIVES):
        return Kind.COMMUNICATION
    return Kind.ATTENTION if _ATTENTION_KERNEL.search(name) else Kind.OTHER


def kind_of_kernel(name: str) -> Kind:
    """Return the kind of a GPU kernel or copy."""
    if _NCCL_KERNEL.search(name):
        return Kind.COMMUNICATION
    if _POINTWISE_KERNEL.match(name):
        return Kind.OTHER
    if _ATTENTION_KERNEL.search(name):  # before cutlass, of which some are made
        return Kind.ATTENTION
    if _MATMUL_KERNEL.search(name):
        return Kind.MATMUL
    return Kind.OPTIMIZER if _OPTIMIZER_KERNEL.search(name) else Kind.OTHER


def matmul_flops(name: str, dims: Sequence[Sequence[int]]) -> int:
    """Return the FLOPs of a matrix product; 0 for other operators, or without shapes.

    dims: shapes of its arguments; [] for one that is not a tensor.
    """
    left = _LEFT_MATRIX.get(name)
    if left is None or len(dims) < left + 2:
        return 0
    a, b = dims[left], dims[left + 1]
    if len(a) < 2 or len(b) < 2:
        return 0
    count = 2 * b[-2 if name == _LINEAR else -1]
    for size in a:
        count *= size
    return count


def short_name(name: str, width: int) -> str:
    """A kernel's name without its arguments and what all names share, cut to `width`."""
    bare = name.split(">(")[0] + ">" if ">(" in name else name
    bare = _NOISE.sub("", bare)
    return bare if len(bare) <= width else bare[: width - 1] + "…"
