"""Rotary position embedding (Su et al. 2021), halves rotated as in GPT-NeoX and Llama."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from megaphase.parallel.topology import device


class _RotateQueriesAndKeys(torch.autograd.Function):
    # One function from the fused projection to queries, keys and values, so that their gradients
    # are written side by side where they belong, rather than rotated, joined and copied.

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, counts: tuple[int, int, int], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = counts
        ctx.counts = counts
        ctx.save_for_backward(cos, sin)
        turning, v = heads.split([queries + keys, values], dim=2)
        q, k = _rotate(turning, cos, sin, torch.empty_like(turning)).split([queries, keys], dim=2)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        batch, seq, _, head_dim = grads[0].shape
        gradient = grads[0].new_empty(batch, seq, sum(ctx.counts), head_dim)
        q, k, v = gradient.split(ctx.counts, dim=2)
        _rotate(grads[0], cos, -sin, q)
        _rotate(grads[1], cos, -sin, k)
        v.copy_(grads[2])
        return gradient, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + head_dim / 2]) by its angle; `sin` is half as wide as `cos`."""
    torch.mul(x, cos, out=out)
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    out_first.addcmul_(second, sin, value=-1)
    out_second.addcmul_(first, sin)
    return out


class Rotary:
    """Turns queries and keys by angles that grow with the position."""

    def __init__(self, head_dim: int, seq_len: int, base: float, dtype: torch.dtype) -> None:
        # In fp32, as in the programs that other models are trained with: the rounding of the angles
        # is part of the model. With exact ones its logits would differ by 1e-4 at 2,000 tokens.
        frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(seq_len).float(), frequencies).unsqueeze(1)
        self._cos = angles.cos().repeat(1, 1, 2).to(device(), dtype)  # [seq, 1, head_dim]
        self._sin = angles.sin().to(device(), dtype)  # [seq, 1, head_dim / 2]

    def __call__(
        self, heads: Tensor, counts: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys turned, and values, of [batch, seq, sum(counts), head_dim]."""
        seq = heads.shape[1]
        cos, sin = (table[..., :seq, :, :] for table in (self._cos, self._sin))
        return _RotateQueriesAndKeys.apply(heads, counts, cos, sin)

    def at(self, positions: Tensor) -> Rotary:
        """The same for tokens at these positions, int64 [batch, seq], rather than 0, 1, 2 ..."""
        chosen = copy(self)
        chosen._cos, chosen._sin = self._cos[positions], self._sin[positions]
        return chosen
