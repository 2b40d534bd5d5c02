"""Errors of collectives, by which a rank notices that another one has ended."""

from __future__ import annotations

import os
import traceback

# Words of the errors with which a collective or its store breaks off, on any backend.
_BROKEN_CONNECTION = (
    *("gloo", "nccl", "tcpstore", "processgroup", "process group", "socket"),
    *("connection closed", "connection reset", "connection refused", "broken pipe"),
)
_COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")


def is_collective_error(error: BaseException) -> bool:
    """Whether an error came out of a collective, as it does on all ranks that outlive another."""
    import torch.distributed as dist

    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    if isinstance(error, dist.DistError) or any(words in text for words in _BROKEN_CONNECTION):
        return True
    files = (frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return any(map(is_collective, files))


def is_collective(filename: str) -> bool:
    """Whether code of this file only runs on behalf of a collective."""
    return any(part in filename for part in _COLLECTIVES)
