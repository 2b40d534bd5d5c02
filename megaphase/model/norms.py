"""Norms over the hidden dimension.

Each returns the sum of the residual stream and what is added to it, and that sum normalized: both
come from one kernel where there is one.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.parameter_spec import Constant, ParameterSpec
from megaphase.ops.layer_norm import layer_norm
from megaphase.ops.recompute import recomputable
from megaphase.ops.rms_norm import add_and_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019)."""

    def __init__(
        self, hidden: int, eps: float, build: LayerBuilder, *, recomputed: bool = False
    ) -> None:
        """recomputed: whether the linear layer that follows saves no copy of the output."""
        super().__init__()
        self.region, self.eps, self.kernels = build.region, eps, build.kernels
        self.recomputed = recomputed
        weight = ParameterSpec((hidden,), Constant(1.0), weight_decay=False)
        self.weight = build.parameter("weight", weight)

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + added, and that normalized."""
        weight = self.region.replicated(self.weight)
        total, normed = add_and_rms_norm(x, added, weight, self.eps, self.kernels)
        if self.recomputed:
            again = partial(rms_norm, total.detach(), self.weight, self.eps, self.kernels)
            normed = recomputable(normed, again)
        return total, normed


class LayerNorm(nn.Module):
    """Layer norm (Ba, Kiros and Hinton 2016)."""

    def __init__(
        self, hidden: int, eps: float, build: LayerBuilder, *, recomputed: bool = False
    ) -> None:
        """recomputed: whether the linear layer that follows saves no copy of the output."""
        super().__init__()
        self.region, self.eps, self.kernels = build.region, eps, build.kernels
        self.recomputed = recomputed
        weight = ParameterSpec((hidden,), Constant(1.0), weight_decay=False)
        bias = ParameterSpec((hidden,), Constant(0.0), weight_decay=False)
        self.weight = build.parameter("weight", weight)
        self.bias = build.parameter("bias", bias)

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + added, and that normalized."""
        weight, bias = (self.region.replicated(each) for each in (self.weight, self.bias))
        total = x if added is None else x + added
        normed = layer_norm(total, weight, bias, self.eps, self.kernels)
        if self.recomputed:
            again = partial(
                layer_norm, total.detach(), self.weight, self.bias, self.eps, self.kernels
            )
            normed = recomputable(normed, again)
        return total, normed


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
