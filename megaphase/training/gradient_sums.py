"""Corrects how DeepSpeed 0.19 sums gradients: it copies without need, and frees too soon."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sum_without_copies(zero: Any) -> None:
    """Let DeepSpeed 0.19's BF16_Optimizer add a gradient in one kernel.

    It casts every gradient to fp32 first, which is written and read again. The sums have the same
    bits: the cast is exact, and torch computes the same sum with it or without.

    zero: DeepSpeed's optimizer; those of other kinds are left as they are.
    """
    if type(zero).__name__ != "BF16_Optimizer":
        return

    @torch.no_grad()
    def add(parameter: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = zero.fp32_groups_gradients[group][index]
        total.add_(parameter.grad.view(total.shape))
        parameter._hp_grad = total  # type: ignore[attr-defined]
        zero.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            parameter.grad.zero_()

    zero._update_hp_grad = add


def keep_until_reduced(zero: Any) -> None:
    """Let ZeRO 3 keep the memory of a gradient until the stream that reduces it has read it.

    DeepSpeed's optimizer says to the allocator that this stream uses a gradient only on ranks that
    hold a part of the parameter. On the others, which are many where parameters are small, the
    memory would be free while the reduction has yet to read it, and the backward pass would write
    the next gradients there.

    zero: DeepSpeed's optimizer; those of other kinds are left as they are.
    """
    if type(zero).__name__ != "DeepSpeedZeroOptimizer_Stage3":
        return
    partition = zero.partition_grads

    def partition_kept(parameters: list[Tensor], parts: list[Tensor]) -> Any:
        # It is called within the stream that reduces.
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_cuda:
                parameter.grad.record_stream(torch.cuda.current_stream())
        return partition(parameters, parts)

    zero.partition_grads = partition_kept


def reduce_nothing(engine: Any) -> None:
    """Let DeepSpeed's engine of ZeRO 0 leave the gradients as they are, for one data-parallel rank.

    It would copy all of them into one buffer, sum that over the single rank, and copy them back.
    """
    engine.allreduce_no_retain = lambda *_, **__: None
