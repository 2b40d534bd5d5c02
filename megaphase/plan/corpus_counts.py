"""Numbers of a corpus for which its documents have to be visited."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megaphase.utils.files import atomic_write_json, hash_json, read_json, with_hash, without_hash

# In a run's directory of plans.
COUNTS_FILE = "counts.json"
# Raised whenever a number is counted in another way.
FORMAT_VERSION = 1


class CorpusCounts:
    """Every number is found once, by this process, an earlier one, or another one of the run.

    Attributes:
        known: the numbers by the hash of what determines them.
    """

    def __init__(
        self,
        known: Mapping[str, list[float]] | None = None,
        verify: Callable[[], object] | None = None,
    ) -> None:
        """
        Args:
            verify: compares the files of the corpora with their manifests; None: that has been
                done.
        """
        self.known = dict(known or {})
        self._verify = verify
        self._used: set[str] = set()
        self._found_any = False

    @classmethod
    def stored(cls, folder: Path, verify: Callable[[], object] | None = None) -> CorpusCounts:
        """Return those that `store` wrote into a folder; none if it has no intact file of them."""
        try:
            stored: Any = without_hash(read_json(folder / COUNTS_FILE))
            known = stored["counts"] if stored["format"] == FORMAT_VERSION else {}
        except (OSError, ValueError, AttributeError, KeyError):
            known = {}
        return cls(known, verify)

    def store(self, folder: Path) -> None:
        """Write those that this process has used into a folder, if it has found any new one.

        Raises:
            OSError: it cannot be written.
        """
        if self._found_any:
            counts = {key: self.known[key] for key in sorted(self._used)}
            atomic_write_json(
                folder / COUNTS_FILE, with_hash({"format": FORMAT_VERSION, "counts": counts})
            )

    def of(self, determining: list[Any], count: Callable[[], list[float]]) -> list[float]:
        """Return numbers; `count` finds them where they are not known yet.

        determining: JSON values that name the numbers and determine them.
        """
        key = hash_json(determining)
        self._used.add(key)
        if key not in self.known:
            self.verify_once()
            self.known[key] = count()
            self._found_any = True
        return self.known[key]

    def verify_once(self) -> None:
        """Verify the corpora, unless that has been done; called before any document is visited.

        Raises as `verify` does.
        """
        if self._verify is not None:
            self._verify()
            self._verify = None
