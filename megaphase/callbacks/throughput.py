"""The arithmetic that this process's device could do, against which MFU is measured."""

from __future__ import annotations

import torch

from megaphase.config.run import RunConfig
from megaphase.distributed.process_grid import device
from megaphase.estimate.hardware import peak_flops


def device_peak_flops(config: RunConfig) -> float | None:
    """FLOP/s of this process's device in the run's precision, None where nothing says it."""
    return peak_flops(config, _device_name())


def missing_peak(config: RunConfig) -> str | None:
    """Why there is no MFU, and the key that would give it; None where there is, or on a CPU."""
    name = _device_name()
    if name is None or peak_flops(config, name) is not None:
        return None
    return (
        f"No MFU: the {config.precision} peak of {name} is not in the table of cards; "
        "hardware.peak_tflops gives it"
    )


def _device_name() -> str | None:
    return torch.cuda.get_device_name() if device().type == "cuda" else None
