"""Rows that hold several documents which do not see each other.

`documents` is int64 [batch, seq]: the number of every token's document, ascending along a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megaphase.ops.attention import attention


class AttentionFn(Protocol):
    """Attention of queries [batch, heads, seq, head_dim] to keys and values [batch, kv_heads, seq,
    head_dim]; the queries' shape."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def attend_within(documents: Tensor, dtype: torch.dtype) -> AttentionFn:
    """Attention of every token to itself and to the earlier tokens of its document.

    dtype: of queries, keys and values.
    """
    if documents.is_cuda and dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] >= 8:
        return _VariableLength.of(documents)
    return _Masked(own_document_mask(documents))


def _each_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values once for every query head that shares them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


@dataclass(frozen=True)
class _Masked:
    mask: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The fused GPU kernel that takes a mask knows no groups; without it, the scores of all
        # heads would be stored.
        k, v = (_each_head(x, q.shape[1]) for x in (k, v))
        return attention(q, k, v, self.mask)


@dataclass(frozen=True)
class _VariableLength:
    """Flash attention over all documents of a batch, one after the other; nothing is masked.

    bounds: int32 [documents + 1], where each begins in the tokens of all rows, and the end.
    """

    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, documents: Tensor) -> _VariableLength:
        begins = document_begins(documents).flatten().nonzero().squeeze(-1)
        end = begins.new_tensor([documents.numel()])
        return cls(torch.cat([begins, end]).int(), documents.shape[1])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        rows, heads, seq, _ = q.shape
        q, k, v = (_each_head(x, heads).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        y = varlen_attn(
            q, k, v, self.bounds, self.bounds, self.longest, self.longest, window_size=(-1, 0)
        )
        assert isinstance(y, Tensor)  # nothing beside it was asked for
        return y.unflatten(0, (rows, seq)).transpose(1, 2)


def own_document_mask(documents: Tensor) -> Tensor:
    """The mask by which a token attends to itself and to the earlier tokens of its document:
    bool [batch, 1, query, key]."""
    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
    return same.tril_().unsqueeze(1)


def document_begins(documents: Tensor) -> Tensor:
    """Whether a token is its document's first in the row: bool [batch, seq]."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins


def positions_in_document(documents: Tensor) -> Tensor:
    """Every token's place from its document's start in the row on: int64 [batch, seq]."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return places - places.where(document_begins(documents), 0).cummax(1).values
