"""Spares copies of gradients that DeepSpeed makes without need."""

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


def reduce_nothing(engine: Any) -> None:
    """Let DeepSpeed's engine of ZeRO 0 leave the gradients as they are, for one data-parallel rank.

    It would copy all of them into one buffer, sum that over the single rank, and copy them back.
    """
    engine.allreduce_no_retain = lambda *_, **__: None
