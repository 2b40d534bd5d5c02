"""Cross entropy of logits whose vocabulary is spread over the tensor-parallel group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megaphase.parallel.topology import Topology


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, ignored: int, first: int, topology: Topology
    ) -> Tensor:
        logits = logits.float()
        top = torch.full(logits.shape[:-1], float("-inf"), device=logits.device)
        if logits.shape[-1]:
            top = logits.amax(-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=topology.tensor_group)
        exponentials = (logits - top.unsqueeze(-1)).exp_()

        local = targets - first
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(elsewhere, 0).unsqueeze(-1)
        chosen = torch.zeros_like(top)
        if logits.shape[-1]:
            chosen = logits.gather(-1, local).squeeze(-1) - top
        sums = torch.stack([exponentials.sum(-1), chosen.masked_fill(elsewhere, 0)])
        dist.all_reduce(sums, group=topology.tensor_group)

        skip = targets == ignored
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), local, elsewhere, skip)
        return (sums[0].log() - sums[1]).masked_fill(skip, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        softmax, local, elsewhere, skip = ctx.saved_tensors
        if softmax.shape[-1]:
            hit = torch.where(elsewhere.unsqueeze(-1), 0.0, -1.0)
            softmax.scatter_add_(-1, local, hit.to(softmax.dtype))
        gradient = softmax.mul_(grads[0].masked_fill(skip, 0).unsqueeze(-1))
        return gradient, None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, *, ignored: int, first: int, topology: Topology
) -> Tensor:
    """Loss of every token, in nats, fp32 [batch, seq]; 0 where the target is `ignored`.

    logits:  [batch, seq, vocabulary of this rank], beginning with the token id `first`
    targets: int64 [batch, seq], token ids of the whole vocabulary

    Only the largest logit, the sum of exponentials and the target's logit of each token travel
    between ranks (Shoeybi et al. 2019, section 3).
    """
    if topology.tensor_size > 1:
        loss = _VocabParallelCrossEntropy.apply(logits, targets, ignored, first, topology)
        return loss
    flat = logits.float().view(-1, logits.shape[-1])
    losses = F.cross_entropy(flat, targets.reshape(-1), ignore_index=ignored, reduction="none")
    return losses.view(targets.shape)
