"""Attention by torch's fused kernels.

On a GPU torch chooses among them by its own rules; which one computes is decided by what it is
called with:

- Training in bf16, without a mask: cuDNN's where torch prefers it (Hopper and Blackwell data-center
  cards, with a recent cuDNN), otherwise flash attention; both know grouped queries. cuDNN makes a
  plan for each shape, and a run has one or two. With `deterministic: true`: flash attention, as
  cuDNN's gradient is not deterministic.
- Rows of several documents, or with a sliding window, in bf16: flash attention over their bounds
  (`varlen_attn`).
- In fp32, or with a mask on cards before compute capability 8.0: the memory-efficient kernel, which
  knows no grouped queries: keys and values are repeated for it.
- Capped scores: FlexAttention, see `ops.capped_attention`.
- Generation, where every token has one key more: see `without_plans`.

On the CPU it is torch's flash attention for the CPU, in all cases but that of capped scores. Over
few keys bf16 is computed in fp32, as the gradient of bf16 takes two to four times as long there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaphase.ops.matmul import is_widened

_FEW_KEYS = 256


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention of queries [batch, heads, seq, head_dim] to keys and values with kv_heads heads.

    mask: which tokens a token attends to, as for `scaled_dot_product_attention`, if heads equals
    kv_heads; by default itself and all before. scale: of the scores, 1 / √head_dim by default.
    Returns the queries' shape.
    """
    dtype = q.dtype
    if is_widened(q) or _is_faster_in_fp32(q, k):
        q, k, v = q.float(), k.float(), v.float()
    if not _has_grouped_kernel(q):
        k, v = (each_head(x, q.shape[1]) for x in (k, v))
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] > k.shape[1] and mask is None,
    )
    return y.to(dtype)


def each_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values [batch, kv_heads, seq, head_dim] once for every query head that shares
    them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _has_grouped_kernel(q: Tensor) -> bool:
    """Whether a fused kernel for these queries knows grouped ones; otherwise torch would compute
    and store the scores of all heads."""
    if q.device.type != "cuda":
        return True
    return q.dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] >= 8


def _is_faster_in_fp32(q: Tensor, k: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= _FEW_KEYS


def without_plans() -> AbstractContextManager[None]:
    """Within it, attention by kernels that need no preparation for another number of keys: flash
    attention, and with a mask the memory-efficient kernel.

    cuDNN builds a plan for each, which takes tens of milliseconds of the host.
    """
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    context: AbstractContextManager[None] = sdpa_kernel(kernels)
    return context
