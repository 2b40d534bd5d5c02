"""Collectives over the tensor-parallel group that autograd can differentiate.

Each is the transpose of another, as in Megatron-LM (Shoeybi et al. 2019, section 3; Korthikanti
et al. 2022 for the sequence-parallel pair). Activations are [batch, seq, hidden].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaphase.parallel.topology import Topology

SEQUENCE_DIM = 1


Finish = Callable[[], Tensor]
"""Waits for a collective that has been started, and returns its result."""


def start_all_reduce(x: Tensor, topology: Topology) -> Finish:
    """Sum over the group; x is used up."""
    x = x.contiguous()
    work = dist.all_reduce(x, group=topology.tensor_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return x

    return finish


def start_gather_sequence(x: Tensor, topology: Topology) -> Finish:
    """[batch, seq / tensor, hidden] -> [batch, seq, hidden]."""
    parts = [torch.empty_like(x) for _ in range(topology.tensor_size)]
    work = dist.all_gather(parts, x.contiguous(), group=topology.tensor_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return torch.cat(parts, dim=SEQUENCE_DIM)

    return finish


def start_reduce_scatter_sequence(x: Tensor, topology: Topology) -> Finish:
    """Sum [batch, seq, hidden] and keep one's own [batch, seq / tensor, hidden]."""
    parts = [part.contiguous() for part in x.chunk(topology.tensor_size, dim=SEQUENCE_DIM)]
    own = torch.empty_like(parts[0])
    work = dist.reduce_scatter(own, parts, group=topology.tensor_group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return own

    return finish


class _CopyToTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, topology: Topology) -> Tensor:
        ctx.topology = topology
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_all_reduce(grads[0].clone(), ctx.topology)(), None


class _ReduceFromTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, topology: Topology) -> Tensor:
        return start_all_reduce(x.clone(), topology)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, topology: Topology) -> Tensor:
        ctx.topology = topology
        return start_gather_sequence(x, topology)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_reduce_scatter_sequence(grads[0], ctx.topology)(), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, topology: Topology) -> Tensor:
        ctx.topology = topology
        return start_reduce_scatter_sequence(x, topology)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_gather_sequence(grads[0], ctx.topology)(), None


def copy_to_tensor_parallel(x: Tensor, topology: Topology) -> Tensor:
    """Identity forward, sum over the tensor-parallel group backward."""
    if topology.tensor_size == 1:
        return x
    return _CopyToTensorParallel.apply(x, topology)


def reduce_from_tensor_parallel(x: Tensor, topology: Topology) -> Tensor:
    """Sum over the tensor-parallel group forward, identity backward."""
    if topology.tensor_size == 1:
        return x
    return _ReduceFromTensorParallel.apply(x, topology)


def gather_sequence(x: Tensor, topology: Topology) -> Tensor:
    """[batch, seq / tensor, hidden] -> [batch, seq, hidden]; backward sums and scatters."""
    return _GatherSequence.apply(x, topology)


def reduce_scatter_sequence(x: Tensor, topology: Topology) -> Tensor:
    """Sum [batch, seq, hidden] and keep one's own [batch, seq / tensor, hidden]."""
    return _ReduceScatterSequence.apply(x, topology)
