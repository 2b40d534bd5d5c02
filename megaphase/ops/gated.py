"""Gated activations (Shazeer 2020) on the output of one fused projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaphase.ops.kernels import Kernels
from megaphase.ops.row_order import stored_order


def _swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_gradient(grad: Tensor, gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    opening = torch.sigmoid(gate)
    opened = gate * opening
    slope = (gate - opened).add_(1).mul_(opening)  # silu' = σ (1 + gate − silu)
    return torch.cat([slope.mul_(up).mul_(grad), opened.mul_(grad)], dim=-1)


def _geglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _geglu_gradient(grad: Tensor, gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    for_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
    return torch.cat([for_gate, F.gelu(gate, approximate="tanh").mul_(grad)], dim=-1)


# By the names of the run file: the formula and its gradient.
_FORMULAS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "swiglu": (_swiglu, _swiglu_gradient),
    "geglu": (_geglu, _geglu_gradient),
}


class _Gated(torch.autograd.Function):
    # Keeps its input alone, and writes the gradients of both halves side by side where they belong.

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, name: str, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        formula, ctx.gradient = _FORMULAS[name]
        ctx.kernels = kernels
        return kernels.of(formula)(gate_and_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.kernels.of(ctx.gradient)(grads[0], *ctx.saved_tensors), None, None


def gated(gate_and_up: Tensor, name: str, kernels: Kernels) -> Tensor:
    """silu(gate) · up (`swiglu`) or gelu(gate) · up with GELU by tanh (`geglu`) of [..., 2 · ffn],
    the gate's half first."""
    order = stored_order(gate_and_up)
    activated: Tensor = _Gated.apply(order(gate_and_up), name, kernels)
    return order(activated)
