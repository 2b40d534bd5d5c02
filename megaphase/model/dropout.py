"""Dropout (Srivastava et al. 2014) whose masks are a function of the run, not of its layout.

The mask of a row is a hash of its seed, the layer and the number of the element. So it
does not matter which rank or device holds the row, in which micro-batch, or how often the pass is
computed; no generator has a state to be saved, and all rows are drawn at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaphase.distributed.costs import Rank
from megaphase.distributed.tensor_region import TensorRegion
from megaphase.utils.decimals import as_written
from megaphase.utils.seeds import derive_key

# Four elements share a word of 64 bits, for drawing is most of what dropout costs. The share is
# rounded to a multiple of 1 / LEVELS, and the scale is that of the rounded one.
LEVELS = 2**16
_ELEMENTS_PER_WORD = 4
# Of SplitMix64 (Steele, Lea and Flood 2014): the odd number next to 2^64 / golden ratio. Signed.
_STRIDE = 0x9E3779B97F4A7C15 - 2**64
# Of a mixer by degski, x ^= x >> 32, x *= FACTOR, twice and the first part once more. Signed.
_FACTOR = 0xD6E8FEB86659FD93 - 2**64


def row_seeds(seed: int, step: int, rows: range) -> Tensor:
    """Seeds of the dropout masks of some rows of a step's global batch; int64 [rows], CPU.

    Args:
        seed: the run's.
        step: its number over the whole run.
        rows: their numbers within the global batch.
    """
    return torch.tensor([_int63(seed, "row", step, row) for row in rows])


def _int63(seed: int, *purpose: str | int) -> int:
    return derive_key(seed, "dropout", *purpose) >> 1


class Dropout:
    """Drops elements at one place of the model, and scales the others up to keep the mean."""

    def __init__(self, share: float, place: str, region: TensorRegion) -> None:
        """place: its name; every place has masks of its own."""
        self._share = share
        dropped = min(round(as_written(share) * LEVELS), LEVELS - 1)
        self._region, self._place_seed = region, _int63(0, "place", place)
        self._first_kept = dropped - LEVELS // 2
        self._scale = LEVELS / (LEVELS - dropped)

    def __call__(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        """Of [batch, seq, hidden], with sequence parallelism [batch, seq / tensor, hidden].

        seeds: int64 [batch], see `row_seeds`; nothing is dropped without them.
        """
        if seeds is None:
            return x
        return _ZeroOrScale.apply(x, self._kept(x, seeds), self._scale)

    def saved_bytes(self, rank: Rank, hidden: int) -> int:
        """Bytes that autograd saves: the mask, one for each element of the residual stream."""
        return rank.outer_tokens * hidden if self._share else 0

    def _kept(self, x: Tensor, seeds: Tensor) -> Tensor:
        """bool, as `x`; a rank that holds some of the positions draws for all of them."""
        batch, own_seq, hidden = x.shape
        seq = own_seq * (self._region.grid.tensor_size if self._region.sequence else 1)
        elements = seq * hidden
        numbers = torch.arange(-(-elements // _ELEMENTS_PER_WORD), device=x.device)
        words = _mixed((seeds + self._place_seed).unsqueeze(1) + numbers * _STRIDE)
        levels = words.view(torch.int16)[:, :elements].reshape(batch, seq, hidden)
        return self._region.own_positions(levels) >= self._first_kept


class _ZeroOrScale(torch.autograd.Function):
    # Keeps one byte an element. The CPU takes ten times as long to choose by a random mask, or to
    # multiply by one that is no floating-point number, as to multiply by this one made into one.

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return kept.to(x.dtype).mul_(scale).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return kept.to(grad.dtype).mul_(ctx.scale).mul_(grad), None, None


def _mixed(words: Tensor) -> Tensor:
    """Bits that look random, in place; int64."""
    halves = words.view(torch.int32).unflatten(-1, (-1, 2))
    low, high = halves[..., 0], halves[..., 1]
    low.bitwise_xor_(high)  # x ^= x >> 32, where shifts of signed numbers copy the sign
    for _ in range(2):
        words.mul_(_FACTOR)
        low.bitwise_xor_(high)
    return words
