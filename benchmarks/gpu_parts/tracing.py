"""What a step does on the device: waits of the host, kernels, and which kernels attend."""

from __future__ import annotations

import re
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpu_parts.setups import synchronize

ATTENTION = re.compile(r"flash|fmha|attention|sdpa|softmax_warp", re.IGNORECASE)
KINDS = (
    ("attention", ATTENTION),
    ("matrix product", re.compile(r"gemm|nvjet|cutlass|xmma|cublas|splitK", re.IGNORECASE)),
    ("collective", re.compile(r"nccl", re.IGNORECASE)),
    ("copy", re.compile(r"^mem(cpy|set)", re.IGNORECASE)),
    ("compiled", re.compile(r"^triton", re.IGNORECASE)),
)
RUNTIME = re.compile(r"^(cuda|cu)[A-Z]\w*")
LARGEST = 25  # kernels by time


@contextmanager
def explicit_waits(found: Counter[str]) -> Iterator[None]:
    """Count calls of `synchronize`, which torch's debug mode does not report, by their place."""
    owners = (torch.cuda, torch.cuda.Event, torch.cuda.Stream)
    usual = [owner.synchronize for owner in owners]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            frames = traceback.extract_stack(limit=4)[:-1]
            found[" < ".join(place(f.filename, f.lineno or 0) for f in reversed(frames))] += 1
            return function(*arguments, **keywords)

        return call

    for owner, function in zip(owners, usual, strict=True):
        owner.synchronize = counted(function)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for owner, function in zip(owners, usual, strict=True):
            owner.synchronize = function  # type: ignore[attr-defined]


def place(file: str, line: int) -> str:
    """The end of a path, and the line."""
    return f"{'/'.join(file.split('/')[-3:])}:{line}"


def waits_of(step: Callable[[], object]) -> dict[str, dict[str, int]]:
    """Where the host waits for the device in one step, by torch's debug mode and by calls."""
    called: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with explicit_waits(called):
                step()
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
    warned = Counter(
        place(each.filename, each.lineno) for each in caught if "synchroniz" in str(each.message)
    )
    return {"synchronizing operations": dict(warned), "calls of synchronize": dict(called)}


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other")


def kernels_of(step: Callable[[], object]) -> dict[str, Any]:
    """Kernels of one step by torch's profiler: number and time by kind, the largest, idle time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        synchronize()
    events = list(profile.events())
    gpu = torch.autograd.DeviceType.CUDA
    on_device = [e for e in events if e.device_type == gpu and not e.is_user_annotation]
    runtime = Counter(e.name for e in events if e.device_type != gpu and RUNTIME.match(e.name))
    spans = sorted((e.time_range.start, e.time_range.end) for e in on_device)
    counts: Counter[str] = Counter()
    times: defaultdict[str, float] = defaultdict(float)
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for event in on_device:
        microseconds = event.time_range.end - event.time_range.start
        counts[kind_of(event.name)] += 1
        times[kind_of(event.name)] += microseconds
        by_name[event.name].append(microseconds)
    largest = sorted(by_name.items(), key=lambda each: -sum(each[1]))[:LARGEST]
    busy = covered(spans)
    span = spans[-1][1] - spans[0][0] if spans else 0.0
    return {
        "kernels": sum(counts.values()) - counts["copy"],
        "number": dict(counts),
        "milliseconds": {kind: round(us / 1e3, 3) for kind, us in times.items()},
        "span_ms": round(span / 1e3, 2),
        "idle_share": round(1 - busy / span, 4) if span else None,
        "runtime_calls": dict(runtime.most_common(20)),
        "attention_kernels": sorted(name[:160] for name in by_name if ATTENTION.search(name)),
        "largest": [
            {"name": name[:160], "number": len(us), "ms": round(sum(us) / 1e3, 3)}
            for name, us in largest
        ],
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals that are sorted by their start."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
