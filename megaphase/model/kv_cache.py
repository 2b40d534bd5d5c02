"""Keys and values of earlier tokens, so that the GPT computes only the new ones.

The rows of a batch are padded on the left: the newest tokens of all rows are in the same slot, a
step writes and reads slices, and only positions and mask depend on how long a row is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megaphase.model.attention_rule import AttentionRule
from megaphase.model.shape import GPTShape
from megaphase.ops.capped_attention import capped_attention

MASK_ALIGNMENT = 16


class CachedTokens(NamedTuple):
    """One layer's keys and values, and the mask of the new tokens.

    Attributes:
        keys, values: [rows, kv_heads, slots, head_dim] up to the slot of the newest token, from the
            first one that a new token attends to or an earlier one; the last slots are for the
            new tokens.
        mask: [rows, 1, seq, slots], added to the scores: 0 for the slots that each of those tokens
            attends to, otherwise -inf.
        rule: of the layer.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    rule: AttentionRule

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention that stores the new keys and values, and attends to them and all earlier ones.

        q: [rows, heads, seq, head_dim]; k, v: [rows, kv_heads, seq, head_dim]. Returns q's shape.
        """
        rows, heads, seq, _ = q.shape
        self.keys[:, :, -seq:], self.values[:, :, -seq:] = k, v
        keys, values, kv_heads = self.keys, self.values, k.shape[1]
        scale, cap = self.rule.scale, self.rule.softcap
        if cap is not None:
            return capped_attention(q, keys, values, self.mask, scale, cap)
        if seq == 1:
            # The queries that share a key are treated as several tokens that see the same slots, so
            # no key is copied for them.
            y = F.scaled_dot_product_attention(
                q.reshape(rows, kv_heads, heads // kv_heads, -1),
                keys,
                values,
                self.mask,
                scale=scale,
            )
            return y.reshape(q.shape)
        if heads > kv_heads:
            keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
        return F.scaled_dot_product_attention(q, keys, values, self.mask, scale=scale)


class CachedBatch(NamedTuple):
    """New tokens of all rows, and what each layer has cached.

    Attributes:
        positions: of the new tokens in their rows, int64 [rows, seq]; 0 for padding.
        layers: one for each block.
    """

    positions: Tensor
    layers: list[CachedTokens]


class KVCache:
    """The keys and values of a batch; allocated once.

    Attributes:
        filled: slots that hold a token, or the padding before a row's first one.
    """

    def __init__(
        self,
        shape: GPTShape,
        padding: Tensor,
        *,
        rows: int,
        slots: int,
        dtype: torch.dtype,
        tensor_size: int = 1,
    ) -> None:
        """
        Args:
            padding: int64 [batch], how many slots of each row are empty before its first token.
            rows: the most that `select` will ask for.
            slots: most tokens of a row, padding included.
            tensor_size: tensor-parallel ranks, of which each holds its own heads.
        """
        kv_heads = shape.kv_heads // tensor_size
        size = (shape.layers, rows, kv_heads, slots, shape.head_size)
        self._keys, self._values = (
            torch.empty(size, dtype=dtype, device=padding.device) for _ in range(2)
        )
        self._padding = padding
        self._rules = [AttentionRule.of(shape.of_block(block)) for block in range(shape.layers)]
        self.filled = 0

    def append(self, seq: int) -> CachedBatch:
        """Give every row `seq` more slots, for new tokens."""
        rows, padding = len(self._padding), self._padding[:, None]
        first, self.filled = self.filled, self.filled + seq
        new = torch.arange(first, self.filled, device=padding.device)
        windows = dict.fromkeys(rule.window for rule in self._rules)
        masks = {window: self._mask(new, first, window) for window in windows}
        layers = []
        for keys, values, rule in zip(self._keys, self._values, self._rules, strict=True):
            mask = masks[rule.window]
            seen = slice(self.filled - mask.shape[-1], self.filled)
            layers.append(CachedTokens(keys[:rows, :, seen], values[:rows, :, seen], mask, rule))
        return CachedBatch((new - padding).clamp_(min=0), layers)

    def _mask(self, new: Tensor, first: int, window: int | None) -> Tensor:
        """The mask of new tokens in the slots `new`, from `first` on: of the last slots, of which
        the ones before are seen by none of them."""
        padding = self._padding[:, None]
        # Rows of an aligned length, or the memory-efficient kernel copies the mask in every layer.
        begin = 0 if window is None else max(first + 1 - window, 0) // MASK_ALIGNMENT
        end = -(-self.filled // MASK_ALIGNMENT)
        slots = torch.arange(begin * MASK_ALIGNMENT, end * MASK_ALIGNMENT, device=padding.device)
        before = slots <= new[:, None]
        if window is not None:
            before &= slots > new[:, None] - window
        seen = (slots >= padding).unsqueeze(1) & before
        # Padding attends to itself: a softmax over nothing would be NaN.
        seen |= slots == new[:, None]
        mask = torch.zeros(seen.shape, dtype=self._keys.dtype, device=padding.device)
        mask.masked_fill_(seen.logical_not_(), -torch.inf)
        return mask[:, None, :, : self.filled - begin * MASK_ALIGNMENT]

    def select(self, rows: Tensor, first_slot: int = 0) -> None:
        """Copy row rows[i] to row i; rows: int64 [rows from now on].

        first_slot: earlier slots are the same in both, and need not be copied.
        """
        self._padding = self._padding[rows]
        slots = slice(first_slot, self.filled)
        for memory in (self._keys, self._values):
            for layer in memory:
                layer[: len(rows), :, slots] = layer[rows, :, slots]
