"""Which earlier tokens a token attends to: all of its row, those of its document, or the nearest.

`documents` is int64 [batch, seq]: the number of every token's document, ascending along a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megaphase.model.attention_rule import PLAIN, AttentionRule
from megaphase.ops.attention import attention, each_head
from megaphase.ops.capped_attention import (
    block_mask,
    capped_attention,
    causal_block_mask,
    flex_capped_attention,
)

# Of the heads' size, in flash attention.
_HEAD_MULTIPLE = 8


class AttentionFn(Protocol):
    """Attention of queries [batch, heads, seq, head_dim] to keys and values [batch, kv_heads, seq,
    head_dim]; the queries' shape."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DocumentBounds:
    """Where each document of some rows begins and ends, counted in the tokens of all rows.

    The numbers of documents are those of the CPU, so that rows are chosen without waiting for the
    device.

    starts: int32 [documents + 1], the first token of each, and the end of the last; counted from
        the first row or from an earlier one.
    rows: for each row, the index of its first document in `starts`; and that of the end.
    """

    starts: Tensor
    rows: tuple[int, ...]

    @classmethod
    def of(cls, documents: Tensor) -> DocumentBounds:
        """documents: int64 [batch, seq]; on the CPU, or the host waits for the device."""
        begins = document_begins(documents)
        starts = begins.flatten().nonzero().squeeze(-1)
        end = starts.new_tensor([documents.numel()])
        counts = begins.sum(1).cumsum(0).tolist()
        return cls(torch.cat([starts, end]).int(), (0, *counts))

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, rows: slice) -> DocumentBounds:
        first, last, _ = rows.indices(len(self))
        chosen = self.rows[first : last + 1]
        starts = self.starts[chosen[0] : chosen[-1] + 1]
        return DocumentBounds(starts, tuple(each - chosen[0] for each in chosen))

    def chunk(self, parts: int) -> list[DocumentBounds]:
        """As `Tensor.chunk` divides the rows."""
        size = -(-len(self) // parts)
        return [self[first : first + size] for first in range(0, len(self), size)]

    def apply(self, copy: Callable[[Tensor], Tensor]) -> DocumentBounds:
        """`starts` copied to other memory."""
        return DocumentBounds(copy(self.starts), self.rows)


def takes_bounds(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether documents are kept apart by their bounds there, rather than by a mask.

    dtype: of queries, keys and values.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability()[0] >= 8


def attend_within(
    documents: Tensor,
    dtype: torch.dtype,
    bounds: DocumentBounds | None = None,
    rule: AttentionRule = PLAIN,
) -> AttentionFn:
    """Attention of every token to itself and to the earlier tokens of its document.

    dtype: of queries, keys and values. bounds: of these documents, on their device; without them,
    the host waits for the device where it takes them.
    """
    if rule.softcap is not None:
        if _compiles_capped(documents.device):
            return _Flex(block_mask(documents, rule.window), rule)
        return _Capped(own_document_mask(documents, rule.window), rule)
    if takes_bounds(documents.device, dtype):
        found = DocumentBounds.of(documents) if bounds is None else bounds
        return _VariableLength(found.starts - found.starts[:1], documents.shape[1], rule)
    return _Masked(own_document_mask(documents, rule.window), rule)


def attend_before(tokens: Tensor, dtype: torch.dtype, rule: AttentionRule = PLAIN) -> AttentionFn:
    """Attention of every token to itself and to the earlier tokens of its row.

    tokens: int64 [batch, seq]. dtype: of queries, keys and values.
    """
    (rows, seq), device = tokens.shape, tokens.device
    window = None if rule.window is None or rule.window >= seq else rule.window
    if rule.softcap is not None:
        if _compiles_capped(device):
            return _Flex(causal_block_mask(seq, window, device), rule)
        return _Capped(_row_mask(seq, window, device), rule)
    if window is None:
        return attention if rule.scale is None else partial(attention, scale=rule.scale)
    if takes_bounds(device, dtype):
        starts = torch.arange(0, (rows + 1) * seq, seq, dtype=torch.int32, device=device)
        return _VariableLength(starts, seq, rule)
    return _Masked(_row_mask(seq, window, device), rule)


def _compiles_capped(device: torch.device) -> bool:
    """Whether capped scores are computed by FlexAttention, which compiles a kernel for every shape:
    not in generation and scoring, whose shapes are many, and whose tensors take no gradients."""
    return device.type == "cuda" and not torch.is_inference_mode_enabled()


@dataclass(frozen=True)
class _Masked:
    mask: Tensor
    rule: AttentionRule = PLAIN

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The fused GPU kernel that takes a mask knows no groups; without it, the scores of all
        # heads would be stored.
        k, v = (each_head(x, q.shape[1]) for x in (k, v))
        return attention(q, k, v, self.mask, self.rule.scale)


@dataclass(frozen=True)
class _Capped:
    mask: Tensor
    rule: AttentionRule

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.rule.softcap is not None
        return capped_attention(q, k, v, self.mask, self.rule.scale, self.rule.softcap)


@dataclass(frozen=True)
class _Flex:
    mask: BlockMask
    rule: AttentionRule

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.rule.softcap is not None
        return flex_capped_attention(q, k, v, self.mask, self.rule.scale, self.rule.softcap)


@dataclass(frozen=True)
class _VariableLength:
    """Flash attention over all documents of a batch, one after the other; nothing is masked.

    bounds: int32 [documents + 1], where each begins in the tokens of all rows, and the end.
    """

    bounds: Tensor
    longest: int
    rule: AttentionRule = PLAIN

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        rows, heads, seq, size = q.shape
        q, k, v = (each_head(x, heads).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        if missing := -size % _HEAD_MULTIPLE:  # zeros change neither scores nor sums
            q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
        y = varlen_attn(
            q,
            k,
            v,
            self.bounds,
            self.bounds,
            self.longest,
            self.longest,
            scale=size**-0.5 if self.rule.scale is None else self.rule.scale,
            window_size=(-1 if self.rule.window is None else self.rule.window - 1, 0),
        )
        assert isinstance(y, Tensor)  # nothing beside it was asked for
        return y[..., :size].unflatten(0, (rows, seq)).transpose(1, 2)


def own_document_mask(documents: Tensor, window: int | None = None) -> Tensor:
    """The mask by which a token attends to itself and to the earlier tokens of its document, but to
    `window` in all: bool [batch, 1, query, key]."""
    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
    return _causal(same, window).unsqueeze(1)


def _row_mask(seq: int, window: int | None, device: torch.device) -> Tensor:
    """The same for rows of one document: bool [1, 1, query, key]."""
    return _causal(torch.ones((1, 1, seq, seq), dtype=torch.bool, device=device), window)


def _causal(mask: Tensor, window: int | None) -> Tensor:
    """A mask [..., query, key] without later tokens and those before the window, in place."""
    mask.tril_()
    return mask if window is None else mask.triu_(1 - window)


def document_begins(documents: Tensor) -> Tensor:
    """Whether a token is its document's first in the row: bool [batch, seq]."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins


def positions_in_document(documents: Tensor) -> Tensor:
    """Every token's place from its document's start in the row on: int64 [batch, seq]."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return places - places.where(document_begins(documents), 0).cummax(1).values
