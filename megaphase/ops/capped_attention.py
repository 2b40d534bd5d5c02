"""Attention whose scores are capped (Gemma 2): softmax(cap tanh(scale q kᵀ / cap)) v.

torch's fused kernels know no cap. In training on a GPU FlexAttention compiles the formula to one
kernel, which skips the blocks of a mask that nobody sees. Elsewhere the scores of some rows and
heads at a time are computed, and again in the backward pass, so that none are saved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megaphase.ops.kernels import OPTIONS, allow_graphs

# Most scores that are computed at once without FlexAttention, if those of the queries that share a
# key are not more.
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
        for part in _parts(q, k):
            probabilities, _ = _probabilities(part.q(q), part.k(k), part.mask(mask), scale, cap)
            own = part.q(out)
            own.copy_((probabilities @ _shared(part.k(v))).reshape(own.shape))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        found = tuple(torch.empty_like(each) for each in (q, k, v))
        for part in _parts(q, k):
            own_q, own_k = part.q(q), part.k(k)
            mine, keys, values = _grouped(own_q, own_k), _shared(own_k), _shared(part.k(v))
            grad = _grouped(part.q(grads[0]), own_k)
            probabilities, bent = _probabilities(own_q, own_k, part.mask(mask), ctx.scale, ctx.cap)
            inner = grad @ values.transpose(-1, -2)
            inner -= (inner * probabilities).sum(-1, keepdim=True)
            # cap tanh(s / cap) has the slope 1 - tanh².
            inner *= probabilities * (1 - bent.square_()) * ctx.scale
            part.q(found[0]).copy_((inner @ keys).reshape(own_q.shape))
            part.k(found[1]).copy_((inner.transpose(-1, -2) @ mine).sum(2))
            part.k(found[2]).copy_((probabilities.transpose(-1, -2) @ grad).sum(2))
        return *found, None, None, None


class _Part(NamedTuple):
    """Rows and heads whose scores are computed at once. groups: queries of each key."""

    rows: slice
    kv_heads: slice
    groups: int

    def q(self, x: Tensor) -> Tensor:
        """Of queries, or what has their shape."""
        first, last = self.kv_heads.start * self.groups, self.kv_heads.stop * self.groups
        return x[self.rows, first:last]

    def k(self, x: Tensor) -> Tensor:
        """Of keys or values."""
        return x[self.rows, self.kv_heads]

    def mask(self, mask: Tensor) -> Tensor:
        return mask if len(mask) == 1 else mask[self.rows]


def _parts(q: Tensor, k: Tensor) -> Iterator[_Part]:
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    heads_at_once = SCORES_AT_ONCE // (groups * q.shape[2] * k.shape[2])
    heads = min(max(heads_at_once, 1), kv_heads)
    rows = max(heads_at_once // kv_heads, 1)
    for row, head in product(range(0, len(q), rows), range(0, kv_heads, heads)):
        yield _Part(slice(row, row + rows), slice(head, head + heads), groups)


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
