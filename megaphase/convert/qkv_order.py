"""The order of the rows of queries, keys and values in one fused projection.

In Megaphase all queries come first, then all keys, then all values. In Megatron-LM and GPT-NeoX
those of each group of heads that share keys and values follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megaphase.model.shape import GPTShape


def interleaved(qkv: Tensor, shape: GPTShape) -> Tensor:
    """Interleave queries, keys and values so that they follow each other group by group.

    qkv: [heads + 2 kv_heads, head_dim] along the first dimension, before and after.
    """
    out = torch.empty_like(qkv)
    for target, source in zip(_in_groups(out, shape), _one_after_another(qkv, shape), strict=True):
        target.copy_(source)
    return out


def deinterleaved(qkv: Tensor, shape: GPTShape) -> Tensor:
    """Undo `interleaved`: all queries, then all keys, then all values."""
    out = torch.empty_like(qkv)
    for target, source in zip(_one_after_another(out, shape), _in_groups(qkv, shape), strict=True):
        target.copy_(source)
    return out


def _one_after_another(qkv: Tensor, shape: GPTShape) -> Iterator[Tensor]:
    """Return views of queries, keys and values stored one after the other: [groups, rows, …]."""
    for part in qkv.split(shape.qkv_segments):
        yield part.view(shape.kv_heads, -1, *qkv.shape[1:])


def _in_groups(qkv: Tensor, shape: GPTShape) -> Iterator[Tensor]:
    """Return views of queries, keys and values stored group by group: [groups, rows, …]."""
    rows = [segment // shape.kv_heads for segment in shape.qkv_segments]
    yield from qkv.view(shape.kv_heads, sum(rows), *qkv.shape[1:]).split(rows, 1)
