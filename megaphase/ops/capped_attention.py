"""Attention whose scores are capped (Gemma 2): softmax(cap tanh(scale q kᵀ / cap)) v.

torch's fused kernels know no cap. On a GPU FlexAttention compiles the formula to one kernel, which
skips the blocks of a mask that nobody sees. Elsewhere the scores of some rows at a time are
computed, and again in the backward pass, so that none are saved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megaphase.ops.kernels import OPTIONS, allow_graphs

# Most scores that are computed at once without FlexAttention, if those of a row are not more.
SCORES_AT_ONCE = 1 << 24


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, cap: float
) -> Tensor:
    """Attention of queries [batch, heads, seq, head_dim] to keys and values with kv_heads heads.

    mask: [batch or 1, 1, seq, keys], which keys a query sees, bool, or 0 and -inf. scale: of the
    scores, 1 / √head_dim by default. Returns the queries' shape; scores are computed in fp32.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out: Tensor = _Capped.apply(q, k, v, mask, scale, cap)
    return out


def flex_capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None, cap: float
) -> Tensor:
    """The same by FlexAttention, with the mask of `block_mask`."""
    out: Tensor = compiled_flex()(
        q,
        k,
        v,
        score_mod=_capped_scores(cap),
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] > k.shape[1],
    )
    return out


@functools.cache
def _capped_scores(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def block_mask(documents: Tensor, window: int | None) -> BlockMask:
    """The mask by which a token attends to itself and to the earlier tokens of its document.

    documents: int64 [batch, seq], ascending along a row. window: the most tokens that a token
    attends to.
    """
    rows, seq = documents.shape

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (key <= query) & (documents[row, key] == documents[row, query])
        return near if window is None else near & (key > query - window)

    mask: BlockMask = compiled_block_mask()(seen, rows, None, seq, seq, device=documents.device)
    return mask


@functools.lru_cache(maxsize=64)
def causal_block_mask(seq: int, window: int | None, device: torch.device) -> BlockMask:
    """The same for rows of one document, whatever their number."""

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query if window is None else (key <= query) & (key > query - window)

    mask: BlockMask = compiled_block_mask()(seen, None, None, seq, seq, device=device)
    return mask


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    allow_graphs()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, options=dict(OPTIONS))


@functools.cache
def compiled_block_mask() -> Callable[..., Any]:
    allow_graphs()
    return torch.compile(create_block_mask, dynamic=False)


class _Capped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.cap = scale, cap
        out = torch.empty_like(q)
        for rows in _parts(q, k):
            probabilities, _ = _probabilities(q[rows], k[rows], _of(mask, rows), scale, cap)
            out[rows] = (probabilities @ _shared(v[rows])).reshape(out[rows].shape)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        found = tuple(torch.empty_like(each) for each in (q, k, v))
        for rows in _parts(q, k):
            mine, keys, values = _grouped(q[rows], k), _shared(k[rows]), _shared(v[rows])
            grad = _grouped(grads[0][rows], k)
            probabilities, bent = _probabilities(
                q[rows], k[rows], _of(mask, rows), ctx.scale, ctx.cap
            )
            inner = grad @ values.transpose(-1, -2)
            inner -= (inner * probabilities).sum(-1, keepdim=True)
            # cap tanh(s / cap) has the slope 1 - tanh².
            inner *= probabilities * (1 - bent.square_()) * ctx.scale
            found[0][rows] = (inner @ keys).reshape(q[rows].shape)
            found[1][rows] = (inner.transpose(-1, -2) @ mine).sum(2)
            found[2][rows] = (probabilities.transpose(-1, -2) @ grad).sum(2)
        return *found, None, None, None


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    """Slices of the rows, whose scores are computed at once."""
    each = q.shape[1] * q.shape[2] * k.shape[2]
    size = max(SCORES_AT_ONCE // each, 1)
    return [slice(first, first + size) for first in range(0, len(q), size)]


def _of(mask: Tensor, rows: slice) -> Tensor:
    return mask if len(mask) == 1 else mask[rows]


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """fp32 [batch, kv_heads, queries of each key, seq, head_dim]."""
    groups: Tensor = q.unflatten(1, (k.shape[1], -1))
    return groups.float()


def _shared(k: Tensor) -> Tensor:
    """fp32 [batch, kv_heads, 1, seq, head_dim]."""
    return k.unsqueeze(2).float()


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """The probabilities of the keys, and the tanh of the scores:
    fp32 [batch, kv_heads, queries of each key, seq, keys]."""
    scores = _grouped(q, k) @ _shared(k).transpose(-1, -2)
    bent = scores.mul_(scale / cap).tanh_()
    capped, mask = bent * cap, mask.unsqueeze(1)
    if mask.dtype == torch.bool:
        capped.masked_fill_(mask.logical_not(), -torch.inf)
    else:
        capped += mask
    return capped.softmax(-1), bent
