"""CRC-32C of the blocks of a .bin, in C++ (csrc/). No array is converted or copied."""

import numpy as np

BLOCK_BYTES: int

def block_checksums(bytes: np.ndarray, instruction: bool = True) -> np.ndarray:
    """u8 [bytes] to u32 [blocks]; instruction: whether the processor's own may be used."""
