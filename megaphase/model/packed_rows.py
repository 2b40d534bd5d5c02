"""Rows that hold several documents which do not see each other.

`documents` is int64 [batch, seq]: the number of every token's document, ascending along a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def own_document_mask(documents: Tensor) -> Tensor:
    """What every token attends to, itself and what its document has before: bool [batch, 1, seq,
    seq], the last dimension being what is attended to."""
    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
    return same.tril_().unsqueeze(1)


def positions_in_document(documents: Tensor) -> Tensor:
    """Every token's place from its document's start in the row on: int64 [batch, seq]."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - places.where(begins, 0).cummax(1).values
