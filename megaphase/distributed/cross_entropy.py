"""Output projection fused with the cross entropy, for a vocabulary split over ranks.

The logits of a whole micro-batch are never in memory: chunk by chunk, they are turned into losses
and gradients at once (as in Liger Kernel, Hsu et al. 2024), so that the backward pass neither
stores nor recomputes logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaphase.distributed.process_grid import ProcessGrid
from megaphase.ops.kernels import Kernels
from megaphase.ops.matmul import add_weight_gradient, matmul

# Logits per chunk. On a CPU, as many as fit its cache; on a GPU, as many as make few but large
# matrix products, because each adds to the whole gradient of the weight.
CPU_LOGITS = 1 << 22
GPU_LOGITS = 1 << 27


@dataclass(frozen=True)
class Vocabulary:
    """How the vocabulary is split over ranks.

    first: token id of this rank's first logit. ignored: the target of tokens without a loss.
    tokens: number of tokens per chunk, the same on all ranks. softcap: logits x become
    softcap · tanh(x / softcap). z_loss: the gradient is that of the loss plus z_loss times the
    squared logarithm of the sum of exponentials.
    """

    first: int
    ignored: int
    grid: ProcessGrid
    kernels: Kernels
    tokens: int
    softcap: float | None = None
    z_loss: float | None = None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocabulary: Vocabulary,
        backward_follows: bool,
        loss_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        penalties: list[Tensor] = []
        used = weight.to(x.dtype)
        if backward_follows:
            ctx.for_x = torch.empty_like(x)
            ctx.for_weight = torch.zeros_like(weight, dtype=torch.float32)
            ctx.dtype = weight.dtype
        for rows in _chunks(len(x), vocabulary.tokens):
            part = x[rows]
            logits = matmul(part, used.t())
            losses[rows], penalty, gradient = _losses(
                logits, targets[rows], vocabulary, backward_follows
            )
            if penalty is not None:
                penalties.append(penalty)
            if gradient is not None:
                # Losses are weighed where their gradients are narrow, not over the vocabulary.
                by = None if loss_weights is None else loss_weights[rows].unsqueeze(-1)
                ctx.for_x[rows] = _weighed(matmul(gradient, used), by)
                add_weight_gradient(ctx.for_weight, gradient, _weighed(part, by))
            del logits, gradient  # before the next ones take memory
        ctx.mark_non_differentiable(losses)
        total = _weighed(losses, loss_weights).sum()
        if penalties:
            total = total + _weighed(torch.cat(penalties), loss_weights).sum()
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        for_x, for_weight = ctx.for_x.mul_(grads[0]), ctx.for_weight.mul_(grads[0])
        del ctx.for_x, ctx.for_weight
        return for_x, for_weight.to(ctx.dtype), None, None, None, None


def _weighed(x: Tensor, by: Tensor | None) -> Tensor:
    """x · by, in x's type; by: fp32."""
    return x if by is None else (x * by).to(x.dtype)


def tokens_at_a_time(rows: int, device: torch.device) -> int:
    """Return the number of tokens per chunk on a device.

    rows: rows of the vocabulary on each rank, padding included.
    """
    return max(1, (CPU_LOGITS if device.type == "cpu" else GPU_LOGITS) // rows)


def _chunks(tokens: int, most: int) -> list[slice]:
    size = -(-tokens // -(-tokens // most))  # equal sizes, so that one compiled kernel serves all
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def score_targets(
    x: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every target in nats, fp32, and whether it is the most likely
    token, bool, both in the targets' shape; 0 and True at ignored targets, whose logits are not
    computed. Of equally likely tokens the one with the smallest id counts.

    x, weight: as in `linear_cross_entropy`; without gradients.
    targets: int64 [batch, seq], or [batch, seq, n] for several of each token.
    """
    flat, wanted = x.flatten(0, -2), targets.flatten()
    gains = torch.zeros(len(wanted), dtype=torch.float32, device=x.device)
    hits = torch.ones_like(wanted, dtype=torch.bool)
    places = (wanted != vocabulary.ignored).nonzero().squeeze(1)
    of_each = max(1, len(wanted) // max(1, len(flat)))
    used = weight.to(x.dtype)
    for rows in _chunks(len(places), vocabulary.tokens) if len(places) else ():
        part = places[rows]
        logits = matmul(flat[part // of_each], used.t())
        losses, _, _ = _losses(logits, wanted[part], vocabulary, backward_follows=False)
        gains[part] = losses.neg_()
        hits[part] = _most_likely(logits, vocabulary) == wanted[part]
        del logits
    return gains.view(targets.shape), hits.view(targets.shape)


def _most_likely(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The id of the most likely token of each row, int64 [tokens]."""
    none = torch.full((len(logits),), torch.iinfo(torch.int64).max, device=logits.device)
    top, best = _top(logits), none
    if logits.shape[-1]:
        best = logits.argmax(-1) + vocabulary.first
    own = top.clone()
    _all_reduce(top, dist.ReduceOp.MAX, vocabulary.grid)
    best = best.where(own == top, none)
    _all_reduce(best, dist.ReduceOp.MIN, vocabulary.grid)
    return best


def _losses(
    logits: Tensor, targets: Tensor, vocabulary: Vocabulary, backward_follows: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses of some tokens, what the z-loss adds to each, and the gradients of the sum
    of both w.r.t. the logits."""
    of, grid, cap = vocabulary.kernels.of, vocabulary.grid, vocabulary.softcap
    columns = targets - vocabulary.first
    elsewhere = (columns < 0) | (columns >= logits.shape[-1])
    columns = columns.masked_fill_(elsewhere, 0).unsqueeze(-1)
    top = of(_top)(logits, cap)
    _all_reduce(top, dist.ReduceOp.MAX, grid)
    sums = of(_sums)(logits, top, columns, elsewhere, cap)
    _all_reduce(sums, dist.ReduceOp.SUM, grid)
    total, chosen = sums
    skip = targets == vocabulary.ignored
    logarithm = total.log()
    losses = (logarithm - chosen).masked_fill_(skip, 0)
    if not backward_follows:
        return losses, None, None
    share, penalty = ~skip / total, None
    if vocabulary.z_loss is not None:
        whole = logarithm.add_(top)
        penalty = (vocabulary.z_loss * whole.square()).masked_fill_(skip, 0)
        share = share * (1 + 2 * vocabulary.z_loss * whole)
    share, hit = share.unsqueeze(-1), (skip | elsewhere).logical_not_().unsqueeze(-1)
    compared = vocabulary.kernels.compiled and logits.is_cuda
    gradient = of(_gradient_by_comparison if compared else _gradient)
    return losses, penalty, gradient(logits, top, share, columns, hit, cap)


# A rank whose part of the vocabulary is only padding has no logits.


def softcapped(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap), in the logits' type."""
    return (logits / cap).tanh() * cap


def _wide(logits: Tensor, cap: float | None) -> Tensor:
    """In fp32, capped; the logits themselves if nothing changes."""
    return logits.float() if cap is None else softcapped(logits.float(), cap)


def _top(logits: Tensor, cap: float | None = None) -> Tensor:
    if not logits.shape[-1]:
        return torch.full(logits.shape[:-1], -torch.inf, device=logits.device)
    return _wide(logits.amax(-1), cap)


def _exponentials(logits: Tensor, top: Tensor, cap: float | None) -> Tensor:
    if cap is None:
        return torch.sub(logits.float(), top.unsqueeze(-1)).exp_()
    # As `softcapped`, in a single tensor.
    return torch.div(logits.float(), cap).tanh_().mul_(cap).sub_(top.unsqueeze(-1)).exp_()


def _sums(
    logits: Tensor, top: Tensor, columns: Tensor, elsewhere: Tensor, cap: float | None = None
) -> Tensor:
    """Return the sum of exponentials and the target's logit, both relative to the largest logit."""
    chosen = torch.zeros_like(top)
    if logits.shape[-1]:
        chosen = _wide(logits.gather(-1, columns).squeeze(-1), cap) - top
    total = _exponentials(logits, top, cap).sum(-1)
    return torch.stack([total, chosen.masked_fill(elsewhere, 0)])


def _through_cap(gradient: Tensor, logits: Tensor, cap: float | None) -> Tensor:
    """The gradient of the logits from that of the capped ones, in place, in the logits' type."""
    if cap is not None:
        # 1 - tanh²
        gradient.mul_(torch.div(logits.float(), cap).tanh_().square_().neg_().add_(1))
    return gradient.to(logits.dtype)


def _gradient(
    logits: Tensor,
    top: Tensor,
    share: Tensor,
    columns: Tensor,
    hit: Tensor,
    cap: float | None = None,
) -> Tensor:
    """Return the softmax minus one at the target, scaled by the targets' weights."""
    if not logits.shape[-1]:
        return logits
    gradient = _exponentials(logits, top, cap).mul_(share)
    return _through_cap(gradient.scatter_add_(-1, columns, -hit.float()), logits, cap)


def _gradient_by_comparison(
    logits: Tensor,
    top: Tensor,
    share: Tensor,
    columns: Tensor,
    hit: Tensor,
    cap: float | None = None,
) -> Tensor:
    """`_gradient`, bit for bit, of which a GPU's compiler makes one kernel: it fuses no scatter."""
    if not logits.shape[-1]:
        return logits
    gradient = _exponentials(logits, top, cap).mul_(share)
    every = torch.arange(logits.shape[-1], device=logits.device)
    is_target = every == columns.masked_fill(~hit, -1)
    return _through_cap(torch.where(is_target, gradient - 1, gradient), logits, cap)


def _all_reduce(x: Tensor, operation: Any, grid: ProcessGrid) -> None:
    if grid.tensor_size > 1:
        dist.all_reduce(x, op=operation, group=grid.tensor_group)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: Vocabulary,
    loss_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of all losses and the loss of every token, in nats, fp32 [] and [batch, seq].

    x:       [batch, seq, hidden], whole on every rank
    weight:  [rows of this rank's vocabulary, hidden]; cast to x's dtype when it is used
    targets: int64 [batch, seq], token ids of the whole vocabulary; `ignored` ones have loss 0
    loss_weights: fp32 [batch, seq], by which each loss is multiplied in the sum; None: 1

    Gradients flow only through the sum, which has the z-loss in it where a backward pass follows;
    the losses of tokens never have it. Only the largest logit, the sum of exponentials and the
    target's logit of each token are exchanged between ranks (Shoeybi et al. 2019, section 3).
    """
    backward_follows = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    by = None if loss_weights is None else loss_weights.flatten()
    total, losses = _LinearCrossEntropy.apply(
        x.flatten(0, -2), weight, targets.flatten(), vocabulary, backward_follows, by
    )
    return total, losses.view(targets.shape)
