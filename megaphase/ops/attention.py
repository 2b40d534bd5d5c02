"""Attention by torch's fused kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megaphase.ops.matmul import is_widened


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of queries [batch, heads, seq, head_dim] to keys and values with kv_heads heads.

    mask: which tokens a token attends to, as for `scaled_dot_product_attention`, if heads equals
    kv_heads; by default itself and all before. Returns the queries' shape.
    """
    dtype, grouped = q.dtype, q.shape[1] > k.shape[1]
    if is_widened(q):
        q, k, v = q.float(), k.float(), v.float()
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=grouped and mask is None
    )
    return y.to(dtype)
