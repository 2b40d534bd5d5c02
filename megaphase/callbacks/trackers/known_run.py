"""`trackers/NAME.json` in a run directory: the run's ID at a tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megaphase.utils.files import atomic_write_json, read_json
from megaphase.utils.run_files import TRACKERS


@dataclass(frozen=True)
class KnownRun:
    """The ID of the run in a directory at one tracker.

    Attributes:
        name: the tracker's key in `logging`.
        target: where its runs are recorded, see `TrackerConfig.target`.
    """

    run_dir: Path
    name: str
    target: Mapping[str, str | None]

    @property
    def folder(self) -> Path:
        """For the tracker's own files."""
        return self.run_dir / TRACKERS / self.name

    @property
    def _file(self) -> Path:
        return self.run_dir / TRACKERS / f"{self.name}.json"

    def read(self, say: Callable[[str], None] = lambda text: None) -> str | None:
        """The ID; None if the run has none at this target. say: is told of a damaged file."""
        try:
            known = read_json(self._file)
            found = known["id"] if known["target"] == dict(self.target) else None
            if found is None or isinstance(found, str):
                return found
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        say(f"Warning: {self._file} is damaged: {self.name} records the run as a new one")
        return None

    def write(self, run_id: str) -> None:
        atomic_write_json(self._file, {"id": run_id, "target": dict(self.target)})
