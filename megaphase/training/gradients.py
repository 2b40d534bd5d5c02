"""The global gradient norm over tensor-parallel shards, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megaphase.distributed.process_grid import ProcessGrid

SMALLEST_NORM = 1e-6  # as in torch and DeepSpeed


def clip_gradients(parameters: Iterable[Tensor], limit: float, grid: ProcessGrid) -> Tensor:
    """Scale gradients in place so that their norm is at most `limit`.

    Returns the norm before, fp32 [], on the device of the gradients.
    Shards are summed over the tensor-parallel group, replicated parameters count once.
    """
    found = [(p, p.grad) for p in parameters if p.grad is not None]
    grads = [grad for _, grad in found]
    mine = [
        grad for p, grad in found if getattr(p, "model_parallel", False) or grid.tensor_rank == 0
    ]
    squares = torch.zeros((), device=grads[0].device)
    for norm in torch._foreach_norm(mine):
        squares += norm.float() ** 2
    dist.all_reduce(squares, group=grid.tensor_group)
    norm = squares.sqrt()
    scale = (limit / (norm + SMALLEST_NORM)).clamp(max=1.0)
    torch._foreach_mul_(grads, scale)
    return norm
