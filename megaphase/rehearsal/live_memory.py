"""The bytes of the device's live storages, and their peak."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable

from torch import Tensor

# torch's caching allocator rounds every allocation up to a multiple of this.
ROUNDING = 512


# The live bytes are listed by place again whenever the peak has grown by this share.
GROWTH = 0.005


class LiveMemory:
    """Counts storages from the first operator that returns them until they are freed.

    Attributes:
        live, peak: bytes.
        by_place: about those of the peak, by the place at which they were allocated.
    """

    def __init__(self, place: Callable[[], str]) -> None:
        self.live = self.peak = 0
        self.by_place: Counter[str] = Counter()
        self._listed = 0
        self._place = place
        self._sizes: dict[int, tuple[int, str]] = {}

    def see(self, x: Tensor) -> None:
        """Count the storage of a tensor of the device, once."""
        storage = x.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // ROUNDING) * ROUNDING
        known = self._sizes.get(key)
        if known is None:
            weakref.finalize(storage, self._free, key).atexit = False
            self._sizes[key] = size, self._place()
            self.live += size
        elif known[0] != size:
            self.live += size - known[0]
            self._sizes[key] = size, known[1]
        if self.live > self.peak:
            self.peak = self.live
            if self.peak > self._listed * (1 + GROWTH):
                self._list()

    def reset_peak(self) -> None:
        self.peak = self.live
        self._list()

    def _list(self) -> None:
        self.by_place = Counter()
        for size, where in self._sizes.values():
            self.by_place[where] += size
        self._listed = self.live

    def _free(self, key: int) -> None:
        size, _ = self._sizes.pop(key)
        self.live -= size
