"""Numbers of a corpus for which all its documents have to be visited."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megaphase.utils.files import hash_json


class CorpusCounts:
    """Every number is found once, by this process or by another one of the run.

    Attributes:
        known: the numbers by the hash of what determines them.
    """

    def __init__(self, known: Mapping[str, list[int]] | None = None) -> None:
        self.known = dict(known or {})

    def of(self, *determining: object, count: Callable[[], list[int]]) -> list[int]:
        """Return numbers; `count` finds them where they are not known yet.

        determining: JSON values that name the numbers and determine them.
        """
        key = hash_json(list(determining))
        if key not in self.known:
            self.known[key] = count()
        return self.known[key]
