"""Check whether a node can take part in a run, before training starts on it."""

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
    """The requirements on a node.

    Attributes:
        output: a folder that must be writable.
        gpus: number of GPUs; 0 for none.
        shared_memory_gb: free GB in /dev/shm, for NCCL.
        clock: current time on the first node, in seconds since 1970; None if it is not known.
        clock_seconds: largest allowed difference of this node's clock.
    """

    output: Path
    gpus: int
    shared_memory_gb: float
    clock: float | None
    clock_seconds: float


def faults(demands: Demands) -> Iterator[str]:
    """Yield descriptions of what is wrong with this node."""
    if demands.gpus:
        yield from gpu_faults(demands.gpus)
    yield from _memory_faults(demands.shared_memory_gb)
    yield from _output_faults(demands.output)
    if demands.clock is not None:
        ahead = time.time() - demands.clock
        if abs(ahead) > demands.clock_seconds:
            direction = "ahead of" if ahead > 0 else "behind"
            yield f"its clock is {abs(ahead):,.0f} s {direction} the first node's"


def gpu_faults(wanted: int) -> Iterator[str]:
    """Yield descriptions of what is wrong with this node's GPUs, each of which computes a
    product."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        yield f"torch cannot be imported ({_line(error)})"
        return
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        # torch itself warns of a driver that is too old, or of a GPU in a bad state.
        reasons = [_line(each.message) for each in warned]
        if torch.version.cuda is None and torch.version.hip is None:
            reasons.append("it was built without CUDA")
        why = "; ".join(reasons) or "check nvidia-smi and CUDA_VISIBLE_DEVICES"
        yield f"torch finds no GPU of {wanted} ({why})"
        return
    found = torch.cuda.device_count()
    if found < wanted:
        yield f"torch finds {found} GPUs of {wanted}"
    for number in range(found):
        try:
            ones = torch.ones(256, 256, device=f"cuda:{number}")
            right = bool((ones @ ones == 256).all())
        except (RuntimeError, AssertionError) as error:  # torch raises AssertionErrors, too
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
        yield f"{SHARED_MEMORY} cannot be read ({error.strerror})"
        return
    if free < wanted_gb:
        yield f"{SHARED_MEMORY} has {free:.2f} GB free, but needs {wanted_gb:g}"


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
    """Return the beginning of another program's message as one line."""
    return " ".join(str(message).split())[:300]
