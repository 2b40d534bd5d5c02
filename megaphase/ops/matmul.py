"""Matrix products of linear layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaphase.ops.row_order import is_sequence_first


@functools.cache
def widens_bf16(device: torch.device) -> bool:
    """Return whether a device computes products of bf16 in fp32 and rounds them once.

    A CPU without instructions for bf16 emulates them, which takes several times as long.
    """
    if device.type != "cpu":
        return False
    cpu = torch.cpu.get_capabilities()
    return not any(cpu.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def is_widened(x: Tensor) -> bool:
    """Return whether products of this tensor are computed in fp32."""
    return x.dtype == torch.bfloat16 and widens_bf16(x.device)


@functools.cache
def prefers_onednn(device: torch.device) -> bool:
    """Return whether oneDNN multiplies fp32 matrices of a device faster than torch's MKL.

    MKL reaches 80 % of an AMD CPU's peak, oneDNN 93 %. torch calls oneDNN for narrower types by
    itself; for fp32 only torch.compile does, by the operator that `matmul` calls.
    """
    if device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return str(torch.cpu.get_capabilities().get("cpu_name", "")).startswith("AMD")


# From this number of rows on, oneDNN is not slower for any width that was measured.
_ONEDNN_ROWS = 64


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed in fp32 and rounded to a's type; rows are stored in the order of a's.

    Without a gradient. a: [rows, inputs] or [batch, seq, inputs]. b: a matrix.
    """
    if is_sequence_first(a):
        return matmul(a.transpose(0, 1), b).transpose(0, 1)
    if is_widened(a):
        return _fp32_matmul(a.float(), b.float()).to(a.dtype)
    return _fp32_matmul(a, b) if a.dtype == torch.float32 else a @ b


def _fp32_matmul(a: Tensor, b: Tensor) -> Tensor:
    rows = a.shape[:-1].numel()
    # oneDNN would copy a transposed first matrix, and refuses an empty one.
    if rows < _ONEDNN_ROWS or not (b.numel() and a.is_contiguous() and prefers_onednn(a.device)):
        return a @ b
    flat = torch.ops.mkldnn._linear_pointwise(a.flatten(0, -2), b.t(), None, "none", [], "")
    # No view, as torch.matmul's product is none: it may be changed in place.
    product: Tensor = torch.ops.aten._unsafe_view(flat, [*a.shape[:-1], b.shape[1]])
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return matmul(grads[0], weight), weight_gradient(grads[0], x)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return the weight's gradient in y = x Wᵀ, [outputs, inputs]; grad [..., outputs], x [...,
    inputs]."""
    if is_sequence_first(grad):
        grad, x = grad.transpose(0, 1), x.transpose(0, 1)
    return matmul(grad.flatten(0, -2).t(), x.flatten(0, -2))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ for x [..., inputs] and W [outputs, inputs]; rows are stored in the order of x's."""
    if is_sequence_first(x):
        return linear(x.transpose(0, 1), weight).transpose(0, 1)
    is_own = is_widened(x) or (x.dtype == torch.float32 and prefers_onednn(x.device))
    return _Linear.apply(x, weight) if is_own else F.linear(x, weight)


def add_weight_gradient(sum_: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add `weight_gradient` to an fp32 sum; grad [tokens, outputs], x [tokens, inputs]."""
    if grad.dtype == torch.float32 or is_widened(x):
        torch.addmm(sum_, grad.float().t(), x.float(), out=sum_)
    else:
        sum_.add_(grad.t() @ x)
