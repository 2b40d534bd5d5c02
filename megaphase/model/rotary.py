"""Angles of the rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from megaphase.ops.kernels import Kernels
from megaphase.ops.rotary import apply_rope


class Rotary:
    """Rotates queries and keys by angles that grow with the position."""

    def __init__(
        self,
        head_dim: int,
        seq_len: int,
        base: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        self._kernels = kernels
        if device.type == "meta":  # a model that is only declared rotates nothing
            return
        # In fp32, as in the programs that other models are trained with: the rounding of the angles
        # is part of the model. With exact ones its logits would differ by 1e-4 at 2,000 tokens.
        frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(seq_len).float(), frequencies).unsqueeze(1)
        self._cos = angles.cos().to(device, dtype)  # [seq, 1, head_dim / 2]
        self._sin = angles.sin().to(device, dtype)

    def __call__(
        self, heads: Tensor, counts: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of [batch, seq, sum(counts), head_dim]."""
        seq = heads.shape[1]
        cos, sin = (table[..., :seq, :, :] for table in (self._cos, self._sin))
        return apply_rope(heads, counts, cos, sin, self._kernels)

    def at(self, positions: Tensor) -> Rotary:
        """The same for tokens at these positions, int64 [batch, seq], rather than 0, 1, 2 ..."""
        chosen = copy(self)
        chosen._cos, chosen._sin = self._cos[positions], self._sin[positions]
        return chosen
