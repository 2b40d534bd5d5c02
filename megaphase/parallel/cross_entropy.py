"""Cross entropy of logits whose vocabulary is spread over the tensor-parallel group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaphase.parallel.topology import Topology


class _VocabParallelCrossEntropy(torch.autograd.Function):
    # fp32 logits become exponentials and those the gradient, all in the same memory: a copy of the
    # logits is by far the largest tensor of a step.

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, ignored: int, first: int, topology: Topology
    ) -> Tensor:
        logits = logits.float()
        top = torch.full(logits.shape[:-1], float("-inf"), device=logits.device)
        if logits.shape[-1]:
            top = logits.amax(-1)
        _all_reduce(top, dist.ReduceOp.MAX, topology)

        local = targets - first
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill_(elsewhere, 0).unsqueeze(-1)
        chosen = torch.zeros_like(top)
        if logits.shape[-1]:
            chosen = logits.gather(-1, local).squeeze(-1) - top
        exponentials = logits.sub_(top.unsqueeze(-1)).exp_()
        sums = torch.stack([exponentials.sum(-1), chosen.masked_fill_(elsewhere, 0)])
        _all_reduce(sums, dist.ReduceOp.SUM, topology)

        skip = targets == ignored
        ctx.save_for_backward(exponentials, sums[0], local, elsewhere, skip)
        return (sums[0].log() - sums[1]).masked_fill_(skip, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        exponentials, total, local, elsewhere, skip = ctx.saved_tensors
        weights = grads[0].masked_fill(skip, 0)
        gradient = exponentials.mul_((weights / total).unsqueeze(-1))
        if gradient.shape[-1]:
            hit = weights.masked_fill_(elsewhere, 0).neg_().unsqueeze(-1)
            gradient.scatter_add_(-1, local, hit)
        return gradient, None, None, None, None


def _all_reduce(x: Tensor, operation: Any, topology: Topology) -> None:
    if topology.tensor_size > 1:
        dist.all_reduce(x, op=operation, group=topology.tensor_group)


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, *, ignored: int, first: int, topology: Topology
) -> Tensor:
    """Loss of every token, in nats, fp32 [batch, seq]; 0 where the target is `ignored`.

    logits:  [batch, seq, vocabulary of this rank], beginning with the token id `first`; they are
             used up: fp32 logits are overwritten
    targets: int64 [batch, seq], token ids of the whole vocabulary

    Only the largest logit, the sum of exponentials and the target's logit of each token travel
    between ranks (Shoeybi et al. 2019, section 3).
    """
    return _VocabParallelCrossEntropy.apply(logits, targets, ignored, first, topology)
