"""Matrix products of linear layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed in fp32 and rounded to a's type; rows are stored in the order of a's.

    a: [rows, inputs] or [batch, seq, inputs]. b: a matrix.
    """
    if is_sequence_first(a):
        return matmul(a.transpose(0, 1), b).transpose(0, 1)
    return (a.float() @ b.float()).to(a.dtype) if is_widened(a) else a @ b


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t())

    @staticmethod
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
    return _Linear.apply(x, weight) if is_widened(x) else F.linear(x, weight)


def add_weight_gradient(sum_: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add `weight_gradient` to an fp32 sum; grad [tokens, outputs], x [tokens, inputs]."""
    if grad.dtype == torch.float32 or is_widened(x):
        torch.addmm(sum_, grad.float().t(), x.float(), out=sum_)
    else:
        sum_.add_(grad.t() @ x)
