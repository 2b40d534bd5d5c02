"""Summarize the time of the profiled steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megaphase.callbacks.profiling.intervals import Spans, clipped, exclusive_lengths, length, spans
from megaphase.callbacks.profiling.kinds import Kind
from megaphase.callbacks.profiling.trace import DeviceTrace, DeviceWork

TOP_KERNELS = 10
_MICRO = 1e-6

# Where several kinds of kernels run at once, the time counts for the first of them.
_COMPUTE = (Kind.MATMUL, Kind.ATTENTION, Kind.OPTIMIZER, Kind.OTHER)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a mean step; all but the last add up to the step.

    Attributes:
        optimizer: its kernels; and, where a GPU waits for an optimizer on the host, that.
        other: kernels that are none of the others, and copies.
        exposed_communication: collectives while no kernel ran, with the waiting for other ranks.
        idle: neither a kernel ran nor a collective: on the CPU, Python and the framework.
        data_wait: for the batch, before the step.
        hidden_communication: collectives while kernels ran.
    """

    matmul: float
    attention: float
    optimizer: float
    other: float
    exposed_communication: float
    idle: float
    data_wait: float
    hidden_communication: float

    @property
    def step(self) -> float:
        parts = (self.matmul, self.attention, self.optimizer, self.other)
        return sum(parts) + self.exposed_communication + self.idle + self.data_wait


@dataclass(frozen=True)
class KernelFigures:
    """All calls of one kernel, or of one operator on the CPU: own time, for a mean step.

    share: of the step.
    """

    name: str
    calls: float
    seconds: float
    share: float


@dataclass(frozen=True)
class Floor:
    """The step against the speed of its matrix products, for one rank.

    Attributes:
        model_flops: of a step by the usual formula, without recomputation.
        matmul_flops: of the matrix products of a step as they were called; 0 where not known.
        matmul_flops_per_second: while they ran; None where not known.
        seconds: that the model FLOPs would take at that speed.
        mfu: model FLOPs of the whole step against the device's peak; None where not known.
    """

    model_flops: float
    matmul_flops: float
    matmul_flops_per_second: float | None
    seconds: float | None
    mfu: float | None


@dataclass(frozen=True)
class RankProfile:
    """The summary of a rank's trace.

    trace: the file's name. on_gpu: whether it contains a GPU's work.
    """

    rank: int
    trace: str
    on_gpu: bool
    seconds: StepTimes
    kernels: list[KernelFigures]
    floor: Floor


def summarize(
    trace: DeviceTrace,
    wait_seconds: Sequence[float],
    *,
    rank: int,
    file: str,
    model_flops: float,
    peak_flops: float | None,
) -> RankProfile:
    """Sum a rank's trace up.

    Args:
        wait_seconds: for the batches of the profiled steps.
        model_flops: of a step, this rank's share.
        peak_flops: of this rank's device, None where it is not known.
    """
    times = step_times(trace, wait_seconds)
    floor = _floor(trace, times, model_flops, peak_flops)
    kernels = top_kernels(trace, times.step)
    return RankProfile(rank, file, trace.on_gpu, times, kernels, floor)


def step_times(trace: DeviceTrace, wait_seconds: Sequence[float]) -> StepTimes:
    """Share the marked steps out among what the device did."""
    layers = [_times(trace.work, kind, trace.steps) for kind in _COMPUTE]
    compute = np.concatenate(layers)
    collectives = np.concatenate(
        [
            _times(trace.work, Kind.COMMUNICATION, trace.steps),
            clipped(trace.host_collectives, trace.steps),
        ]
    )
    layers += [collectives, clipped(trace.host_optimizer, trace.steps), trace.steps]
    scale = _MICRO / len(trace.steps)
    *busy, exposed, on_host, idle = (scale * each for each in exclusive_lengths(layers))
    matmul, attention, optimizer, other = busy
    both = length(np.concatenate([compute, collectives]))
    return StepTimes(
        matmul,
        attention,
        optimizer + on_host,
        other,
        exposed,
        idle,
        data_wait=sum(wait_seconds) / len(wait_seconds),
        hidden_communication=scale * (length(compute) + length(collectives) - both),
    )


def top_kernels(trace: DeviceTrace, step_seconds: float) -> list[KernelFigures]:
    """Those with the most time of their own; on a CPU, where they are not, operators."""
    calls: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    for work in trace.work:
        if _begins_within(work, trace.steps):
            calls[work.name] += 1
            total[work.name] += work.duration
    scale = 1 / len(trace.steps)
    names = sorted(total, key=lambda name: -total[name])[:TOP_KERNELS]
    seconds = {name: _MICRO * scale * total[name] for name in names}
    return [
        KernelFigures(name, scale * calls[name], seconds[name], seconds[name] / step_seconds)
        for name in names
    ]


def _floor(
    trace: DeviceTrace, times: StepTimes, model_flops: float, peak_flops: float | None
) -> Floor:
    matmul_flops = trace.matmul_flops / len(trace.steps)
    known = matmul_flops > 0 and times.matmul > 0
    speed = matmul_flops / times.matmul if known else None
    return Floor(
        model_flops,
        matmul_flops,
        speed,
        None if speed is None else model_flops / speed,
        None if peak_flops is None else model_flops / times.step / peak_flops,
    )


def _times(work: list[DeviceWork], kind: Kind, windows: Spans) -> Spans:
    found = [time for each in work if each.kind is kind for time in each.times]
    return clipped(spans(found), windows)


def _begins_within(work: DeviceWork, windows: Spans) -> bool:
    begin = work.times[0][0]
    return any(start <= begin < end for start, end in windows)
