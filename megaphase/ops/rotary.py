"""Rotary position embedding (Su et al. 2021), halves rotated as in GPT-NeoX and Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaphase.ops.kernels import Kernels
from megaphase.ops.row_order import is_sequence_first, stored_order


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Both halves of x with each pair (x[i], x[i + head_dim / 2]) rotated by its angle."""
    first, second = x.chunk(2, dim=-1)
    return [
        (first * cos).addcmul_(second, sin, value=-1),
        (second * cos).addcmul_(first, sin),
    ]


def _rotated_and_rest(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with as many of its first dimensions rotated as there are angles for."""
    width = 2 * cos.shape[-1]
    rest = [x[..., width:]] if width < x.shape[-1] else []
    return torch.cat([*_rotated(x[..., :width], cos, sin), *rest], dim=-1)


def _rotate_heads(heads: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = _rotated_and_rest(heads[:, :, :count], cos, sin)
    return torch.cat([rotated, heads[:, :, count:]], dim=2)


def _rotate_back(queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = [_rotated_and_rest(part, cos, -sin) for part in (queries, keys)]
    return torch.cat([*rotated, values], dim=2)


class _ApplyRope(torch.autograd.Function):
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
        count = counts[0] + counts[1]
        rotated: Tensor = kernels.of(_rotate_heads)(heads, count, cos, sin)
        parts: tuple[Tensor, ...] = rotated.split(counts, dim=2)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.kernels.of(_rotate_back)(*grads, *ctx.saved_tensors), None, None, None, None


def apply_rope(
    heads: Tensor, counts: tuple[int, int, int], cos: Tensor, sin: Tensor, kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated, and values, of [batch, seq, sum(counts), head_dim].

    cos, sin: of each position's angles, [seq, 1, pairs] or with batch before; up to head_dim / 2
        pairs, and the dimensions that follow them are not rotated.
    """
    order = stored_order(heads)
    if is_sequence_first(heads):  # the same angles in all rows
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k, v = _ApplyRope.apply(order(heads), counts, cos, sin, kernels)
    return order(q), order(k), order(v)
