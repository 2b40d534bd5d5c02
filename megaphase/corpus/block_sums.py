"""Checksums of the blocks of a .bin while it is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megaphase.corpus._checksums import BLOCK_BYTES, block_checksums


class BlockSums:
    """Computes the checksums of a file's blocks from the bytes appended to it."""

    def __init__(self) -> None:
        self._begun = np.empty(0, np.uint8)

    @classmethod
    def at_end_of(cls, path: Path) -> BlockSums:
        """Resume at the end of a file whose complete blocks have already been summed."""
        sums = cls()
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(size // BLOCK_BYTES * BLOCK_BYTES)
            sums._begun = np.frombuffer(file.read(), np.uint8)
        return sums

    def add(self, data: np.ndarray) -> np.ndarray:
        """Add bytes, u8 [bytes], and return the checksums of the completed blocks, u32 [blocks]."""
        missing = -len(self._begun) % BLOCK_BYTES
        first = np.concatenate([self._begun, data[:missing]])
        rest = data[missing:]
        whole = len(rest) // BLOCK_BYTES * BLOCK_BYTES
        if len(first) % BLOCK_BYTES:
            self._begun = first
            return np.empty(0, np.uint32)
        self._begun = rest[whole:].copy()
        return np.concatenate([block_checksums(first), block_checksums(rest[:whole])])

    def end(self) -> np.ndarray:
        """Return the checksum of the last, shorter block, u32 [0 or 1]."""
        return block_checksums(self._begun)
