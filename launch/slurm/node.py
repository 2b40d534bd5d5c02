"""Whether a node can take part in a run: looked at before training starts on it."""

from __future__ import annotations

import os
import shutil
import time
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
        shared_memory_gb: free, for NCCL and the loaders of data.
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
    free = shutil.disk_usage(SHARED_MEMORY).free / GB
    if free < demands.shared_memory_gb:
        yield (
            f"{SHARED_MEMORY} has {free:.1f} GB free, of {demands.shared_memory_gb:g} that are "
            "needed"
        )
    yield from _output_faults(demands.output)
    if demands.clock is not None:
        ahead = time.time() - demands.clock
        if abs(ahead) > demands.clock_seconds:
            direction = "ahead of" if ahead > 0 else "behind"
            yield f"its clock is {abs(ahead):,.0f} s {direction} the first node's"


def _gpu_faults(wanted: int) -> Iterator[str]:
    import torch

    if not torch.cuda.is_available():
        yield "torch finds no GPU; look at nvidia-smi, the driver's version and the build of torch"
        return
    found = torch.cuda.device_count()
    if found < wanted:
        yield f"torch finds {found} GPUs of {wanted}"
    for number in range(found):
        try:
            ones = torch.ones(256, 256, device=f"cuda:{number}")
            assert float((ones @ ones)[0, 0]) == 256.0
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200] or "a product is wrong"
            yield f"GPU {number} does not compute: {reason}"


def _output_faults(folder: Path) -> Iterator[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield f"{folder} cannot be written ({error.strerror})"
