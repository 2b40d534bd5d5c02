"""Recognize errors of collectives, which show that another rank has ended."""

from __future__ import annotations

import os
import traceback

# Words in the errors that backends raise when a collective or its store fails.
_BROKEN_CONNECTION = (
    *("gloo", "nccl", "tcpstore", "processgroup", "process group", "socket"),
    *("connection closed", "connection reset", "connection refused", "broken pipe"),
)
_COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")


def is_collective_error(error: BaseException) -> bool:
    """Return whether a collective raised the error, as on all ranks that outlive another one."""
    import torch.distributed as dist

    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    if isinstance(error, dist.DistError) or any(words in text for words in _BROKEN_CONNECTION):
        return True
    files = (frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return any(map(is_collective, files))


def is_collective(filename: str) -> bool:
    """Return whether code of this file runs only for a collective."""
    return any(part in filename for part in _COLLECTIVES)
