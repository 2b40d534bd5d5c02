"""Root-mean-square norm (Zhang and Sennrich 2019) of a sum: of the residual stream."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaphase.ops.kernels import Kernels

ROWS_IN_GROUP = 64


def _scale(wide: Tensor, eps: float) -> Tensor:
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1]
    scale: Tensor = (mean_square + eps).rsqrt()
    return scale


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = _scale(wide, eps)
    return (wide * scale * weight).to(x.dtype), scale


def _add_and_norm(
    x: Tensor, added: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = x + added
    return total, *_norm(total, weight, eps)


def _gradients(
    grad_total: Tensor | None, grad: Tensor, total: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    normed, wide = total.float() * scale, grad.float()
    weighted = wide * weight
    along = (weighted * normed).mean(-1, keepdim=True)
    inner = torch.addcmul(weighted, normed, along, value=-1) * scale
    if grad_total is not None:
        inner = inner + grad_total
    return inner.to(total.dtype), _sum_of_rows(wide * normed).to(weight.dtype)


def _sum_of_rows(x: Tensor) -> Tensor:
    # By groups of rows that a cache holds, which several threads can take; otherwise a compiled
    # kernel goes down the columns one after the other.
    groups = x.view(-1, math.gcd(x.numel() // x.shape[-1], ROWS_IN_GROUP), x.shape[-1])
    return groups.sum(1).sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        if added is None:
            total = x.view_as(x)
            normed, scale = kernels.of(_norm)(x, weight, eps)
        else:
            total, normed, scale = kernels.of(_add_and_norm)(x, added, weight, eps)
        ctx.save_for_backward(total, scale, weight)
        ctx.set_materialize_grads(False)
        ctx.adds, ctx.kernels = added is not None, kernels
        return total, normed

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        grad_total, grad = grads
        if grad is None:
            return grad_total, grad_total if ctx.adds else None, None, None, None
        found, for_weight = ctx.kernels.of(_gradients)(grad_total, grad, *ctx.saved_tensors)
        return found, found if ctx.adds else None, for_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in x's type; no gradient."""
    if kernels.apex_norm:
        return _fused(x, weight.to(x.dtype), eps, kernels)
    return kernels.of(_norm)(x, weight, eps)[0]


def add_and_rms_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Return x + added (x if there is nothing to add) and its norm, both in x's dtype.

    One function computes both, so that the gradient of the sum takes one pass over memory.
    """
    if not kernels.apex_norm and (kernels.compiled or not x.is_cuda):
        sum_and_normed: tuple[Tensor, Tensor] = _RMSNorm.apply(x, added, weight, eps, kernels)
        return sum_and_normed
    total = x if added is None else x + added
    return total, _fused(total, weight.to(x.dtype), eps, kernels)


def _fused(x: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> Tensor:
    """Use a kernel that does not compute the sum."""
    if kernels.apex_norm:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        normed: Tensor = fused_rms_norm_affine(x, weight, list(weight.shape), eps)
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)
