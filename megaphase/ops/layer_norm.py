"""Layer norm (Ba, Kiros and Hinton 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megaphase.ops.kernels import Kernels


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, kernels: Kernels) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension, in x's type."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if kernels.apex_norm:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        normed: Tensor = fused_layer_norm_affine(x, weight, bias, list(weight.shape), eps)
        return normed
    return F.layer_norm(x, weight.shape, weight, bias, eps)
