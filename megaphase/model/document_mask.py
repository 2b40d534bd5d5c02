"""Rows that hold several documents which do not see each other.

`documents` is int64 [batch, seq]: the number of every token's document, ascending along a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megaphase.ops.attention import attention


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
    documents: Tensor, dtype: torch.dtype, bounds: DocumentBounds | None = None
) -> AttentionFn:
    """Attention of every token to itself and to the earlier tokens of its document.

    dtype: of queries, keys and values. bounds: of these documents, on their device; without them,
    the host waits for the device where it takes them.
    """
    if takes_bounds(documents.device, dtype):
        found = DocumentBounds.of(documents) if bounds is None else bounds
        return _VariableLength(found.starts - found.starts[:1], documents.shape[1])
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
