"""Whether a node can take part in a run: looked at before training starts on it."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

SHARED_MEMORY = Path("/dev/shm")
GB = 1e9


@dataclass(frozen=True)
class Demands:
    """What a node must have.

    Attributes:
        output: a folder that must be writable.
        gpus: how many; 0 for none.
        shared_memory_gb: free in /dev/shm, for NCCL.
        clock: seconds since 1970 on the first node, a moment ago; None where it is not known.
        clock_seconds: how far from that this node's clock may be.
    """

    output: Path
    gpus: int
    shared_memory_gb: float
    clock: float | None
    clock_seconds: float


def faults(demands: Demands) -> Iterator[str]:
    """What is wrong with this node, in words."""
    if demands.gpus:
        yield from _gpu_faults(demands.gpus)
    yield from _memory_faults(demands.shared_memory_gb)
    yield from _output_faults(demands.output)
    if demands.clock is not None:
        ahead = time.time() - demands.clock
        if abs(ahead) > demands.clock_seconds:
            direction = "ahead of" if ahead > 0 else "behind"
            yield f"its clock is {abs(ahead):,.0f} s {direction} the first node's"


def _gpu_faults(wanted: int) -> Iterator[str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it loads is not there
        yield f"torch cannot be imported ({_line(error)})"
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        # Of a driver that is too old, or a GPU in a bad state, torch itself warns.
        reasons = [_line(each.message) for each in said]
        if torch.version.cuda is None and torch.version.hip is None:
            reasons.append("it was built without CUDA")
        why = "; ".join(reasons) or "look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
        yield f"torch finds no GPU of {wanted} ({why})"
        return
    found = torch.cuda.device_count()
    if found < wanted:
        yield f"torch finds {found} GPUs of {wanted}"
    for number in range(found):
        try:
            ones = torch.ones(256, 256, device=f"cuda:{number}")
            right = bool((ones @ ones == 256).all())
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch's own
            yield f"GPU {number} does not compute ({_line(error)})"
        else:
            if not right:
                yield f"GPU {number} computes wrong products"


def _memory_faults(wanted_gb: float) -> Iterator[str]:
    if not wanted_gb:
        return
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free / GB
    except OSError as error:
        yield f"{SHARED_MEMORY} cannot be looked at ({error.strerror})"
        return
    if free < wanted_gb:
        yield f"{SHARED_MEMORY} has {free:.2f} GB free, of {wanted_gb:g} that are needed"


def _output_faults(folder: Path) -> Iterator[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield f"{folder} cannot be written ({error.strerror})"


def _line(message: object) -> str:
    """The beginning of what somebody else says, as one line."""
    return " ".join(str(message).split())[:300]
