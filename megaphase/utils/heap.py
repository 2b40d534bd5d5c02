"""Tune glibc's memory allocation for large tensors; nothing happens with another C library."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

# Parameters of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def prepare_for_large_tensors() -> None:
    """Allocate memory in huge pages and return it when a tensor is freed; call before torch starts.

    A conversion touches every byte of new memory once: with pages of 4 kB, half of its time would
    be page faults. Moreover, glibc raises the size from which it returns freed blocks at once, up
    to 32 MB, and keeps smaller ones in a heap per thread: as much again as a conversion needs.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    _set({_M_MMAP_THRESHOLD: 1 << 22})


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for the next ones; for training on a CPU.

    Every step allocates the same tensors. By default glibc returns those of 32 MB or more when they
    are freed, and the top of its heap with them, so that each step would fault all pages in again:
    13 % of the time of a small model.
    """
    _set({_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: 1 << 30})


def _set(values: dict[int, int]) -> None:
    with suppress(AttributeError, OSError):
        c_library = ctypes.CDLL(None)
        for parameter, value in values.items():
            c_library.mallopt(parameter, value)
