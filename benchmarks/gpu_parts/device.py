"""Versions, the device, and its ceilings."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import statistics
import subprocess
from typing import Any

import torch

from gpu_parts.serving import Results
from gpu_parts.setups import seconds_of
from megaphase.distributed.process_grid import device as run_device

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "numpy", "sentencepiece", "pydantic")
# Products of 1.3b's block and head for 4 × 2,048 tokens, forward: rows, inner, columns.
PRODUCTS = {
    "square": (8192, 8192, 8192),
    "qkv": (8192, 2048, 6144),
    "attention out": (8192, 2048, 2048),
    "gate and up": (8192, 2048, 11008),
    "down": (8192, 5504, 2048),
    "head, 2,668 tokens": (2668, 2048, 50304),
}


def device(results: Results) -> None:
    results.record("versions", versions())
    results.record("device", properties())
    for name, sizes in PRODUCTS.items():
        m, k, n = (64, 64, 64) if results.rehearse else sizes
        results.record(f"product, {name}", product(m, k, n))
    elements = 1 << (12 if results.rehearse else 28)
    source = torch.randn(elements, device=run_device())
    target = torch.empty_like(source)
    seconds = best(lambda: target.copy_(source))
    results.record("copy_gb_per_second", round(2 * source.nbytes / seconds / 1e9, 1))
    results.record("add_gb_per_second", round(3 * source.nbytes / best(lambda: torch.add(
        source, target, out=target)) / 1e9, 1))  # fmt: skip
    if torch.cuda.is_available():
        host = torch.empty(1 << 28, pin_memory=True)
        seconds = best(lambda: host.copy_(source, non_blocking=True))
        results.record("device_to_pinned_gb_per_second", round(host.nbytes / seconds / 1e9, 1))


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return found | {"cuda": torch.version.cuda, "cudnn": cudnn}


def properties() -> dict[str, Any]:
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "machine": platform.machine()}
    found["host_memory_gb"] = round(host_bytes() / 1e9, 1)
    if not torch.cuda.is_available():
        return found | {"name": "cpu"}
    of = torch.cuda.get_device_properties(0)
    found |= {
        "name": of.name,
        "memory_gb": round(of.total_memory / 1e9, 1),
        "processors": of.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability()),
        "nccl": list(torch.cuda.nccl.version()),
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        found["nvidia_smi"] = said.stdout.strip().splitlines()
    return found


def host_bytes() -> int:
    with open("/proc/meminfo") as file:
        return int(file.readline().split()[1]) * 1024


def product(m: int, k: int, n: int) -> dict[str, float]:
    """TFLOP/s of a product as in a forward pass, and of its two gradients."""
    x, weight, out = (
        torch.randn(shape, device=run_device()).bfloat16() for shape in ((m, k), (n, k), (m, n))
    )
    ways = {
        "forward": lambda: x @ weight.t(),
        "gradient of the input": lambda: out @ weight,
        "gradient of the weight": lambda: out.t() @ x,
    }
    return {name: round(2 * m * k * n / best(way) / 1e12, 3) for name, way in ways.items()}


def best(work: Any, rounds: int = 4, repeats: int = 10) -> float:
    """Seconds of the best round, after one that warms up."""
    times = [seconds_of(work, repeats) for _ in range(rounds)]
    return min(times[1:] or [statistics.median(times)])
