"""Root-mean-square norm (Zhang and Sennrich 2019) of a sum: of the residual stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaphase.ops.kernels import Kernels

ROWS_IN_GROUP = 64

# Both gradients in one pass: torch gives every program of a GPU 16 rows, so that fewer rows leave
# processors of a large GPU idle; of longer rows, not all values fit the registers.
ENOUGH_ROWS, LONGEST_ROW = 2048, 8192


def _scale(wide: Tensor, eps: float) -> Tensor:
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1]
    scale: Tensor = (mean_square + eps).rsqrt()
    return scale


def _factor(weight: Tensor, zero_centered: bool) -> Tensor:
    """What normalized values are multiplied by: the weight, or 1 + weight in fp32."""
    return weight.float() + 1 if zero_centered else weight


def _norm(
    x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = _scale(wide, eps)
    return (wide * scale * _factor(weight, zero_centered)).to(x.dtype), scale


def _add_and_norm(
    x: Tensor, added: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    total = x + added
    return total, *_norm(total, weight, eps, zero_centered)


def _gradients(
    grad_total: Tensor | None,
    grad: Tensor,
    total: Tensor,
    scale: Tensor,
    weight: Tensor,
    zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:
    factor = _factor(weight, zero_centered)
    found, terms = _gradient_and_terms(grad_total, grad, total, scale, factor)
    # By groups of rows that a cache holds, which several threads can take; otherwise a kernel
    # compiled for a CPU goes down the columns one after the other.
    groups = terms.view(-1, math.gcd(_rows(terms), ROWS_IN_GROUP), terms.shape[-1])
    return found, groups.sum(1).sum(0).to(weight.dtype)


def _gradient_and_terms(
    grad_total: Tensor | None, grad: Tensor, total: Tensor, scale: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of the sum, and that of the weight before it is summed over the rows."""
    normed, wide = total.float() * scale, grad.float()
    weighted = wide * factor
    along = (weighted * normed).mean(-1, keepdim=True)
    inner = torch.addcmul(weighted, normed, along, value=-1) * scale
    if grad_total is not None:
        inner = inner + grad_total
    return inner.to(total.dtype), wide * normed


def _gradients_in_one_pass(
    grad_total: Tensor | None,
    grad: Tensor,
    total: Tensor,
    scale: Tensor,
    weight: Tensor,
    zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """`_gradients`, in the form in which torch compiles sums over rows and over columns into one
    kernel."""
    factor = _factor(weight, zero_centered)
    found, terms = _gradient_and_terms(grad_total, grad, total, scale, factor)
    return found, terms.flatten(0, -2).sum(0).to(weight.dtype)


def _gradients_by_halves(
    grad_total: Tensor | None,
    grad: Tensor,
    total: Tensor,
    scale: Tensor,
    weight: Tensor,
    zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same for a square, of which torch cannot distinguish rows from columns."""
    middle, factor = _rows(total) // 2, _factor(weight, zero_centered)
    found, sums = [], []
    for rows in (slice(None, middle), slice(middle, None)):
        above = None if grad_total is None else grad_total.flatten(0, -2)[rows]
        one, two, three = (x.flatten(0, -2)[rows] for x in (grad, total, scale))
        gradient, terms = _gradient_and_terms(above, one, two, three, factor)
        found.append(gradient)
        sums.append(terms.sum(0))
    return torch.cat(found).view_as(total), (sums[0] + sums[1]).to(weight.dtype)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def gradients_formula(
    grad_total: Tensor | None, total: Tensor, weight: Tensor, shared_memory: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The formula of both gradients that reads and writes the fewest bytes once compiled for a GPU.

    shared_memory: bytes that a program of the GPU may use at most.
    """
    rows, hidden = _rows(total), total.shape[-1]
    passes = 2 if rows == hidden else 1
    # A program keeps two rows of every input, padded to a power of two, and a few values more.
    row = (2 if grad_total is None else 3) * total.element_size() + weight.element_size()
    padded = 1 << (hidden - 1).bit_length()
    fits = padded <= LONGEST_ROW and 2 * row * padded + 1024 <= shared_memory
    if rows // passes < ENOUGH_ROWS or not fits:
        return _gradients
    return _gradients_in_one_pass if passes == 1 else _gradients_by_halves


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        weight: Tensor,
        eps: float,
        kernels: Kernels,
        zero_centered: bool,
    ) -> tuple[Tensor, Tensor]:
        if added is None:
            total = x.view_as(x)
            normed, scale = kernels.of(_norm)(x, weight, eps, zero_centered)
        else:
            total, normed, scale = kernels.of(_add_and_norm)(x, added, weight, eps, zero_centered)
        ctx.save_for_backward(total, scale, weight)
        ctx.set_materialize_grads(False)
        ctx.adds, ctx.kernels = added is not None, kernels
        ctx.zero_centered = zero_centered
        return total, normed

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        grad_total, grad = grads
        if grad is None:
            return grad_total, grad_total if ctx.adds else None, None, None, None, None
        total, scale, weight = ctx.saved_tensors
        grad = grad.contiguous()
        formula = _gradients
        if grad.is_cuda and ctx.kernels.compiled:
            card = torch.cuda.get_device_properties(grad.device)
            shared = getattr(card, "shared_memory_per_block_optin", 0)  # AMD's do not say
            formula = gradients_formula(grad_total, total, weight, shared)
        inputs = (grad_total, grad, total, scale, weight, ctx.zero_centered)
        found, for_weight = ctx.kernels.of(formula)(*inputs)
        return found, found if ctx.adds else None, for_weight, None, None, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, kernels: Kernels, zero_centered: bool = False
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in x's type; no gradient.

    zero_centered: multiply by 1 + weight.
    """
    if kernels.apex_norm and not zero_centered:
        return _fused(x, weight.to(x.dtype), eps, kernels)
    return kernels.of(_norm)(x, weight, eps, zero_centered)[0]


def add_and_rms_norm(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    eps: float,
    kernels: Kernels,
    zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return x + added (x if there is nothing to add) and its norm, both in x's dtype.

    One function computes both, so that the gradient of the sum takes one pass over memory.
    zero_centered: multiply by 1 + weight, which no fused kernel of others does without rounding it.
    """
    own = not kernels.apex_norm and (kernels.compiled or not x.is_cuda)
    if own or zero_centered:
        sum_and_normed: tuple[Tensor, Tensor] = _RMSNorm.apply(
            x, added, weight, eps, kernels, zero_centered
        )
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
