"""64-bit keys for all random orders: a function of the seed and of their purpose."""

from __future__ import annotations

import hashlib


def derive_key(seed: int, *purpose: str | int) -> int:
    """Return the key for one purpose, e.g. `derive_key(seed, "documents", task, epoch)`.

    It depends neither on the order in which keys are requested nor on the platform or Python's
    hash seed.
    """
    text = "\0".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
