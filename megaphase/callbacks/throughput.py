"""The reference for throughput: FLOPs of a token, and the peak of the devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megaphase.config.run import RunConfig
from megaphase.distributed.process_grid import device
from megaphase.estimate.hardware import peak_flops
from megaphase.model.parameters import train_flops_per_token
from megaphase.model.shape import GPTShape


@dataclass(frozen=True)
class ThroughputReference:
    """The constants of a run from which its throughput and MFU are computed.

    Attributes:
        flops_per_token: of a forward and backward pass in each phase.
        peak_flops: of all devices together, None where it is not known.
    """

    flops_per_token: tuple[int, ...]
    peak_flops: float | None

    def mfu(self, tokens_per_second: float, phase: int) -> float | None:
        """Model FLOPs utilization in a phase; None where the peak is not known."""
        if self.peak_flops is None:
            return None
        return self.flops_per_token[phase] * tokens_per_second / self.peak_flops


def throughput_reference(
    config: RunConfig, shapes: Sequence[GPTShape], world_size: int
) -> ThroughputReference:
    """Of a run on so many processes; shapes: of the model in every phase."""
    one = device_peak_flops(config)
    peak = None if one is None else one * world_size
    return ThroughputReference(tuple(map(train_flops_per_token, shapes)), peak)


def device_peak_flops(config: RunConfig) -> float | None:
    """FLOP/s of this process's device in the run's precision, None where it is not known."""
    return peak_flops(config, _device_name())


def missing_peak(config: RunConfig) -> str | None:
    """Why there is no MFU, and the key that would enable it; None if there is one, or on a CPU."""
    name = _device_name()
    if name is None or peak_flops(config, name) is not None:
        return None
    return (
        f"No MFU: the {config.precision} peak of {name} is not in the table of cards; "
        "hardware.peak_tflops gives it"
    )


def _device_name() -> str | None:
    return torch.cuda.get_device_name() if device().type == "cuda" else None
