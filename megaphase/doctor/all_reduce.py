"""One rank of an all-reduce: `python -m megaphase.doctor.all_reduce BACKEND RANKS FOLDER RANK`.

Rank 0 prints the bandwidth in GB/s with which a ring would send what was sent.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

ELEMENTS = {"nccl": 32 << 20, "gloo": 1 << 20}  # of fp32
REPEATS = 5
SECONDS = 45


def main(backend: str, ranks: int, folder: Path, rank: int) -> None:
    """Sum a tensor; end with an exception if the sum is wrong or another rank is missing."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend,
        init_method=f"file://{folder.absolute()}/ranks",
        world_size=ranks,
        rank=rank,
        timeout=timedelta(seconds=SECONDS),
    )
    values = torch.full((ELEMENTS[backend],), float(rank + 1), device=device)
    distributed.all_reduce(values)
    if not bool((values == ranks * (ranks + 1) / 2).all()):
        raise SystemExit("the sum is wrong")
    _wait(device)
    began = time.monotonic()
    for _ in range(REPEATS):
        distributed.all_reduce(values)
    _wait(device)
    seconds = (time.monotonic() - began) / REPEATS
    distributed.destroy_process_group()
    if rank == 0:
        print(f"{values.nbytes * 2 * (ranks - 1) / ranks / seconds / 1e9:.1f}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
