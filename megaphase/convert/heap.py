"""Tune memory allocation for large tensors."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_THRESHOLD_BYTES = 1 << 22


def prepare_for_large_tensors() -> None:
    """Allocate memory in huge pages and return it when a tensor is freed; call before torch starts.

    A conversion touches every byte of new memory once: with pages of 4 kB, half of its time would
    be page faults. Moreover, glibc raises the size from which it returns freed blocks at once, up
    to
    32 MB, and keeps smaller ones in a heap per thread: as much again as a conversion needs. Does
    nothing with another C library.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
