"""Measure a machine's best matrix products (FLOP/s) and memory traffic (bytes/s)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 8


@dataclass(frozen=True)
class Machine:
    """The best figures measured."""

    matmul_flops: float
    memory_bytes_per_second: float

    def best(self, other: Machine) -> Machine:
        """Return the better of two measurements of one machine for each figure."""
        return Machine(
            max(self.matmul_flops, other.matmul_flops),
            max(self.memory_bytes_per_second, other.memory_bytes_per_second),
        )


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Multiply square matrices of `dtype` with the quickest library; add vectors that are larger
    than any cache."""
    n = 8192 if device.type == "cuda" else 2048
    a, b, out = (torch.rand((n, n), device=device).to(dtype) for _ in range(3))
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # oneDNN, which torch uses by itself for narrower types than fp32.
        linear = torch.ops.mkldnn._linear_pointwise
        products.append(lambda: linear(a, b, None, "none", [], ""))
    flops = 2 * n**3 / min(_quickest_seconds(product, device) for product in products)
    x, y, z = (torch.rand(1 << 26, device=device) for _ in range(3))
    bandwidth = 3 * x.nbytes / _quickest_seconds(lambda: torch.add(x, y, out=z), device)
    return Machine(flops, bandwidth)


def _quickest_seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
