"""xIELU (Huang and Schlag 2024), an activation with two learnt scalars."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaphase.ops.kernels import Kernels
from megaphase.ops.row_order import stored_order

# The slope at 0, and the largest negative number whose exponential is computed, as in the models
# that were published with it.
BETA, EPS = 0.5, -1e-6
# With these both slopes start at 0.8.
INITIAL_POSITIVE, INITIAL_NEGATIVE = (math.log(math.expm1(s)) for s in (0.8, 0.8 - BETA))


def _slopes(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    return F.softplus(positive.float()), BETA + F.softplus(negative.float())


def _xielu(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    wide = x.float()
    above, below = _slopes(positive, negative)
    of_negative = (torch.expm1(wide.clamp(max=EPS)) - wide) * below
    y = torch.where(wide > 0, above * wide * wide, of_negative) + BETA * wide
    return y.to(x.dtype)


def _gradients(
    grad: Tensor, x: Tensor, positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x and of both scalars."""
    wide, g = x.float(), grad.float()
    above, below = _slopes(positive, negative)
    is_positive, exponential = wide > 0, torch.expm1(wide.clamp(max=EPS))
    of_negative = below * torch.where(wide < EPS, exponential, -1.0)
    slope = torch.where(is_positive, 2 * above * wide, of_negative) + BETA
    for_above = torch.where(is_positive, g * wide * wide, 0.0).sum()
    for_below = torch.where(is_positive, 0.0, g * (exponential - wide)).sum()
    return (
        (g * slope).to(x.dtype),
        (for_above * torch.sigmoid(positive.float())).to(positive.dtype),
        (for_below * torch.sigmoid(negative.float())).to(negative.dtype),
    )


class _XIELU(torch.autograd.Function):
    # Keeps its input alone.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, positive: Tensor, negative: Tensor, kernels: Kernels
    ) -> Tensor:
        ctx.save_for_backward(x, positive, negative)
        ctx.kernels = kernels
        return kernels.of(_xielu)(x, positive, negative)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *ctx.kernels.of(_gradients)(grads[0], *ctx.saved_tensors), None


def xielu(x: Tensor, positive: Tensor, negative: Tensor, kernels: Kernels) -> Tensor:
    """a x² + x / 2 for x > 0, otherwise b (eˣ - 1 - x) + x / 2, in x's type.

    positive, negative: [1], of which a is the softplus, and b the softplus plus 1 / 2.
    """
    order = stored_order(x)
    activated: Tensor = _XIELU.apply(order(x), positive, negative, kernels)
    return order(activated)
