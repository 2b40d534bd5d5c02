"""Gated activations (Shazeer 2020) on the output of one fused projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaphase.ops.kernels import Kernels
from megaphase.ops.row_order import stored_order


def _gated(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _gradient(grad: Tensor, gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    opening = torch.sigmoid(gate)
    opened = gate * opening
    slope = (gate - opened).add_(1).mul_(opening)  # silu' = σ (1 + gate − silu)
    return torch.cat([slope.mul_(up).mul_(grad), opened.mul_(grad)], dim=-1)


class _SwiGLU(torch.autograd.Function):
    # Keeps its input alone, and writes the gradients of both halves side by side where they belong.

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        ctx.kernels = kernels
        return kernels.of(_gated)(gate_and_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.kernels.of(_gradient)(grads[0], *ctx.saved_tensors), None


def swiglu(gate_and_up: Tensor, kernels: Kernels) -> Tensor:
    """silu(gate) · up of [..., 2 · ffn], the gate's half first."""
    order = stored_order(gate_and_up)
    activated: Tensor = _SwiGLU.apply(order(gate_and_up), kernels)
    return order(activated)
