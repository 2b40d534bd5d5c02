"""How large tensors get their memory, and give it back."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_THRESHOLD_BYTES = 1 << 22


def prepare_for_large_tensors() -> None:
    """Take memory in huge pages, and return it as soon as a tensor is freed; before torch comes.

    A conversion touches every byte of fresh memory once: half of its time would go into pages of
    4 kB. And glibc raises the size from which it returns blocks at once, as blocks are freed, up to
    32 MB, and keeps smaller ones in a heap of every thread: as much again as a conversion needs.
    Does nothing where the C library is another one.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
