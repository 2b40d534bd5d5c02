"""How the C library gives memory back."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_THRESHOLD_BYTES = 1 << 22


def return_large_blocks() -> None:
    """Give every large tensor's memory back to the system as soon as it is freed.

    glibc raises the size from which it does so as blocks are freed, up to 32 MB, and keeps smaller
    ones in a heap of every thread: as much memory again as a conversion needs. Does nothing where
    the C library is another one.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
