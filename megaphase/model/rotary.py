"""Angles of the rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor

from megaphase.model.config import RotaryScalingConfig
from megaphase.ops.kernels import Kernels
from megaphase.ops.rotary import apply_rope


class Rotary:
    """Rotates queries and keys by angles that grow with the position."""

    def __init__(
        self,
        head_dim: int,
        seq_len: int,
        base: float,
        scaling: RotaryScalingConfig | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        self._kernels = kernels
        if device.type == "meta":  # a model that is only declared rotates nothing
            return
        frequencies, length = rotary_frequencies(head_dim, base, scaling)
        # On the CPU also where ZeRO-3 creates tensors on the device: tables that are made at a
        # phase's start are those with which a model is built.
        positions = torch.arange(seq_len, device="cpu").float()
        angles = torch.outer(positions, frequencies).unsqueeze(1)
        self._cos = (angles.cos() * length).to(device, dtype)  # [seq, 1, head_dim / 2]
        self._sin = (angles.sin() * length).to(device, dtype)

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


def rotary_frequencies(
    head_dim: int, base: float, scaling: RotaryScalingConfig | None
) -> tuple[Tensor, float]:
    """Radians per token of every pair of dimensions, fp32 [head_dim / 2], and the factor by which
    queries and keys become longer.

    In fp32 and in this order of operations, as in the programs that other models are trained with:
    the rounding of the angles is part of the model. With exact ones its logits would differ by 1e-4
    at 2,000 tokens.
    """
    powers = base ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    frequencies = 1.0 / powers
    if scaling is None:
        return frequencies, 1.0
    if scaling.type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.type == "llama3":
        return _llama3(frequencies, scaling), 1.0
    assert scaling.attention_factor is not None
    return _yarn(powers, base, scaling), scaling.attention_factor


def _llama3(frequencies: Tensor, scaling: RotaryScalingConfig) -> Tensor:
    """Llama 3.1's: kept with many rotations in the original length, divided with few, and
    interpolated in between."""
    length, low, high = scaling.original_seq_len, scaling.low_freq_factor, scaling.high_freq_factor
    assert length is not None
    assert low is not None
    assert high is not None
    wavelengths = 2 * math.pi / frequencies
    divided = torch.where(wavelengths > length / low, frequencies / scaling.factor, frequencies)
    kept = (length / wavelengths - low) / (high - low)
    between = (1 - kept) * divided / scaling.factor + kept * divided
    is_between = (wavelengths >= length / high) & (wavelengths <= length / low)
    return torch.where(is_between, between, divided)


def _yarn(powers: Tensor, base: float, scaling: RotaryScalingConfig) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): a linear ramp over the dimensions, from those that
    rotate often, which are kept, to those that are divided."""
    length, fast, slow = scaling.original_seq_len, scaling.beta_fast, scaling.beta_slow
    assert length is not None
    assert fast is not None
    assert slow is not None
    pairs = len(powers)

    def dimension(rotations: float) -> float:
        """The dimension that rotates so often in the original length."""
        return 2 * pairs * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension(fast), dimension(slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001
    pair = torch.arange(pairs, dtype=torch.float32, device="cpu")
    kept = 1 - ((pair - first) / (last - first)).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
