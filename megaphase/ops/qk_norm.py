"""Root-mean-square norm of queries and keys, of every head or of all heads together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaphase.ops.kernels import Kernels
from megaphase.ops.row_order import stored_order

Counts = tuple[int, int]


class AllHeads(NamedTuple):
    """Norms over all heads together, of which this rank has some.

    Attributes:
        sizes: entries of all queries, and of all keys, of one token on all ranks.
        sum_over_ranks: sums a tensor over the ranks, in place.
    """

    sizes: tuple[int, int]
    sum_over_ranks: Callable[[Tensor], Tensor]


def _factors(
    query: Tensor, key: Tensor, counts: Counts, head_dim: int, zero_centered: bool
) -> Tensor:
    """[queries + keys, head_dim] from one weight for each head, or one for all heads."""
    parts = zip((query, key), counts, strict=True)
    weights = torch.cat([w.view(-1, head_dim).expand(count, head_dim) for w, count in parts])
    return weights.float() + 1 if zero_centered else weights.float()


def _head_scales(heads: Tensor, counts: Counts, eps: float) -> Tensor:
    wide = heads[:, :, : sum(counts)].float()
    return (wide.square().mean(-1, keepdim=True) + eps).rsqrt()


def _square_sums(heads: Tensor, counts: Counts) -> Tensor:
    """Of the queries and of the keys of each token, [..., 2]."""
    return _group_sums(heads[:, :, : sum(counts)].float().square().sum(-1), counts)


def _group_sums(of_heads: Tensor, counts: Counts) -> Tensor:
    """Of [..., queries + keys], [..., 2]."""
    return torch.stack([part.sum(-1) for part in of_heads.split(counts, -1)], -1)


def _means(sums: Tensor, counts: Counts, sizes: tuple[int, int]) -> Tensor:
    """The mean of every head's group, [..., queries + keys, 1], from sums [..., 2]."""
    parts = zip(sums.split(1, -1), counts, sizes, strict=True)
    means = [(each / size).expand(*each.shape[:-1], n) for each, n, size in parts]
    return torch.cat(means, -1).unsqueeze(-1)


def _group_scales(sums: Tensor, counts: Counts, sizes: tuple[int, int], eps: float) -> Tensor:
    return (_means(sums, counts, sizes) + eps).rsqrt()


def _normalize(
    heads: Tensor, scale: Tensor, query: Tensor, key: Tensor, counts: Counts, zero_centered: bool
) -> Tensor:
    count = sum(counts)
    factor = _factors(query, key, counts, heads.shape[-1], zero_centered)
    normed = (heads[:, :, :count].float() * scale * factor).to(heads.dtype)
    return torch.cat([normed, heads[:, :, count:]], dim=2)


def _normalize_heads(
    heads: Tensor, query: Tensor, key: Tensor, counts: Counts, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    scale = _head_scales(heads, counts, eps)
    return _normalize(heads, scale, query, key, counts, zero_centered), scale


def _products(
    grad: Tensor,
    heads: Tensor,
    scale: Tensor,
    query: Tensor,
    key: Tensor,
    counts: Counts,
    zero_centered: bool,
) -> Tensor:
    """Of every head's normed vector and its gradient, [..., queries + keys]."""
    count = sum(counts)
    factor = _factors(query, key, counts, heads.shape[-1], zero_centered)
    weighted = grad[:, :, :count].float() * factor
    return (weighted * heads[:, :, :count].float() * scale).sum(-1)


def _product_sums(
    grad: Tensor,
    heads: Tensor,
    scale: Tensor,
    query: Tensor,
    key: Tensor,
    counts: Counts,
    zero_centered: bool,
) -> Tensor:
    products = _products(grad, heads, scale, query, key, counts, zero_centered)
    return _group_sums(products, counts)


def _gradients(
    grad: Tensor,
    heads: Tensor,
    scale: Tensor,
    query: Tensor,
    key: Tensor,
    along: Tensor | None,
    counts: Counts,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the heads and of both weights.

    along: mean product of normed vectors and gradients, [..., queries + keys, 1]; None: of each
        head.
    """
    count = sum(counts)
    if along is None:
        products = _products(grad, heads, scale, query, key, counts, zero_centered)
        along = products.unsqueeze(-1) / heads.shape[-1]
    wide, normed = grad[:, :, :count].float(), heads[:, :, :count].float() * scale
    factor = _factors(query, key, counts, heads.shape[-1], zero_centered)
    inner = ((wide * factor - normed * along) * scale).to(heads.dtype)
    terms = (wide * normed).flatten(0, 1).sum(0).split(counts)
    for_weights = [
        term.view(-1, *w.view(-1, heads.shape[-1]).shape).sum(0).view_as(w).to(w.dtype)
        for term, w in zip(terms, (query, key), strict=True)
    ]
    return torch.cat([inner, grad[:, :, count:]], dim=2), for_weights[0], for_weights[1]


class _QKNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        query: Tensor,
        key: Tensor,
        counts: Counts,
        eps: float,
        together: AllHeads | None,
        kernels: Kernels,
        zero_centered: bool,
    ) -> Tensor:
        normed: Tensor
        weights = (query, key, counts)
        if together is None:
            normed, scale = kernels.of(_normalize_heads)(heads, *weights, eps, zero_centered)
        else:
            sums = together.sum_over_ranks(kernels.of(_square_sums)(heads, counts))
            scale = kernels.of(_group_scales)(sums, counts, together.sizes, eps)
            normed = kernels.of(_normalize)(heads, scale, *weights, zero_centered)
        ctx.save_for_backward(heads, scale, query, key)
        ctx.counts, ctx.together, ctx.kernels = counts, together, kernels
        ctx.zero_centered = zero_centered
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, saved = grads[0].contiguous(), ctx.saved_tensors
        together: AllHeads | None = ctx.together
        along = None
        if together is not None:
            of = ctx.kernels.of
            sums = of(_product_sums)(grad, *saved, ctx.counts, ctx.zero_centered)
            along = of(_means)(together.sum_over_ranks(sums), ctx.counts, together.sizes)
        found = ctx.kernels.of(_gradients)(grad, *saved, along, ctx.counts, ctx.zero_centered)
        return *found, None, None, None, None, None


def qk_norm(
    heads: Tensor,
    weights: tuple[Tensor, Tensor],
    counts: tuple[int, int, int],
    eps: float,
    together: AllHeads | None,
    kernels: Kernels,
    zero_centered: bool = False,
) -> Tensor:
    """Normalize the queries and keys in [batch, seq, queries + keys + values, head_dim].

    weights: of queries and keys: [head_dim], or with `together` [count · head_dim].
    counts: heads of queries, keys and values.
    together: whether all heads of a token are normalized together, and how to sum over ranks.
    zero_centered: multiply by 1 + weight.
    """
    order = stored_order(heads)
    settings = (counts[:2], eps, together, kernels, zero_centered)
    normed = _QKNorm.apply(order(heads), *weights, *settings)
    return order(normed)
