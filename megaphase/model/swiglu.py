"""SwiGLU (Shazeer 2020) on the output of one fused projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    # The gradients of both halves are written side by side where they belong; autograd would join
    # them by a copy.

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        opened = F.silu(gate)
        ctx.save_for_backward(gate_and_up, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gate_and_up, opened = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        gradient = torch.empty_like(gate_and_up)
        for_gate, for_up = gradient.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=for_gate)
        torch.mul(grads[0], opened, out=for_up)
        return gradient


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 * ffn], the gate's half first."""
    return _SwiGLU.apply(gate_and_up)
