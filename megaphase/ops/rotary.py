"""Rotary position embedding (Su et al. 2021), halves rotated as in GPT-NeoX and Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaphase.ops.kernels import Kernels


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Both halves of x with each pair (x[i], x[i + head_dim / 2]) turned by its angle."""
    first, second = x.chunk(2, dim=-1)
    return [
        (first * cos).addcmul_(second, sin, value=-1),
        (second * cos).addcmul_(first, sin),
    ]


def _turn_heads(heads: Tensor, turning: int, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.cat(_turned(heads[:, :, :turning], cos, sin), dim=-1)
    return torch.cat([turned, heads[:, :, turning:]], dim=2)


def _turn_back(queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = [torch.cat(_turned(part, cos, -sin), dim=-1) for part in (queries, keys)]
    return torch.cat([*turned, values], dim=2)


class _Turn(torch.autograd.Function):
    # One function from the fused projection to queries, keys and values: nothing of the projection
    # is kept beside them, and their gradients are written side by side where they belong.

    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        counts: tuple[int, int, int],
        cos: Tensor,
        sin: Tensor,
        kernels: Kernels,
    ) -> tuple[Tensor, ...]:
        ctx.kernels = kernels
        ctx.save_for_backward(cos, sin)
        turning = counts[0] + counts[1]
        turned: Tensor = kernels.of(_turn_heads)(heads, turning, cos, sin)
        parts: tuple[Tensor, ...] = turned.split(counts, dim=2)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.kernels.of(_turn_back)(*grads, *ctx.saved_tensors), None, None, None, None


def apply_rope(
    heads: Tensor, counts: tuple[int, int, int], cos: Tensor, sin: Tensor, kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned, and values, of [batch, seq, sum(counts), head_dim].

    cos, sin: of each position's angles, [seq, 1, head_dim / 2] or with batch before.
    """
    turned: tuple[Tensor, Tensor, Tensor] = _Turn.apply(heads, counts, cos, sin, kernels)
    return turned
