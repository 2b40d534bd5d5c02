"""64-bit keys for everything that is shuffled: a function of the seed and of what it is for."""

from __future__ import annotations

import hashlib


def derive_key(seed: int, *purpose: str | int) -> int:
    """The key for one purpose, e.g. `derive_key(seed, "documents", task, epoch)`.

    Independent of the order in which keys are asked for, of the platform and of Python's hash seed.
    """
    text = "\0".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
