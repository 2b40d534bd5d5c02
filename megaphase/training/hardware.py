"""The arithmetic that a device could do, against which model FLOPs utilisation is measured."""

from __future__ import annotations

import torch

from megaphase.parallel.topology import device

# Dense bf16 FLOP/s of the tensor cores, from NVIDIA's data sheets (SXM form where there are two).
BF16_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10": 125e12,
    "V100": 125e12,
}


def peak_flops(dtype: torch.dtype) -> float | None:
    """bf16 FLOP/s of this process's GPU; None for other types, the CPU and unknown GPUs."""
    if device().type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name()
    return next((flops for model, flops in BF16_FLOPS.items() if model in name), None)
