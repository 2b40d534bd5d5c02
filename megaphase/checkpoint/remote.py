"""The checkpoints of a run in an object store: URL/checkpoints/NAME, as in a run directory.

A checkpoint's manifest is written last and removed first, so one with a manifest is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megaphase.checkpoint.state import MANIFEST_FILE, STATE_FILE, step_of
from megaphase.utils.errors import InputError
from megaphase.utils.names import LATEST
from megaphase.utils.remote_files import joined, list_folder, read_bytes, remove
from megaphase.utils.run_files import CHECKPOINTS
from megaphase.utils.validation_errors import hint

# Which run has its checkpoints there.
OWNER_FILE = "upload.json"


class RemoteRun:
    """The folder of one run's checkpoints in a store.

    Every method raises InputError or RemoteError as those of megaphase.utils.remote_files do.
    """

    def __init__(self, url: str) -> None:
        """url: that of the run, in which `checkpoints` lies."""
        self.url = url.rstrip("/")
        self._states: dict[str, dict[str, Any]] = {}

    def folder(self, name: str) -> str:
        """Return the URL of a checkpoint."""
        return joined(self.url, CHECKPOINTS, name)

    def names(self, kind: str = "step") -> list[str]:
        """Return the names of this kind that are there, by step, also of incomplete checkpoints."""
        found = [(step_of(name, kind), name) for name in self._listed()]
        return [name for _, name in sorted((step, n) for step, n in found if step is not None)]

    def is_whole(self, name: str) -> bool:
        """Return whether the checkpoint has been uploaded completely."""
        return MANIFEST_FILE in list_folder(self.folder(name))

    def manifest(self, name: str) -> bytes | None:
        """Return the manifest of a checkpoint; None if there is none, or only a part of one."""
        if not self.is_whole(name):
            return None
        return read_bytes(joined(self.folder(name), MANIFEST_FILE))

    def state(self, name: str) -> dict[str, Any]:
        """Return the state of a checkpoint; an empty one if it is incomplete or damaged."""
        if name not in self._states:
            names = list_folder(self.folder(name))
            if MANIFEST_FILE not in names or STATE_FILE not in names:
                return {}
            self._states[name] = _object(read_bytes(joined(self.folder(name), STATE_FILE)))
        return self._states[name]

    def remove(self, name: str) -> None:
        """Remove a checkpoint."""
        self._states.pop(name, None)
        files = list_folder(self.folder(name))
        for file in sorted(files, key=lambda file: file != MANIFEST_FILE):
            if files[file] == "file":
                remove(joined(self.folder(name), file))

    def owner(self) -> dict[str, Any] | None:
        """Return `plan`, the fingerprint of the plan of the run that has claimed the folder, and
        `run`, its identity, which earlier versions did not write; None if no run has."""
        if OWNER_FILE not in list_folder(self.url):
            return None
        return _object(read_bytes(joined(self.url, OWNER_FILE)))

    def find(self, name: str) -> str:
        """Return the name of the checkpoint that NAME in RUN@NAME means: a phase, for the
        checkpoint at its end; a checkpoint; `latest`, `best-TASK` or `best-mean`.

        Raises:
            InputError: there is no such checkpoint.
        """
        if (step_of(name) or step_of(name, "best")) is not None and self.is_whole(name):
            return name
        ends: list[str] = []
        best: dict[str, str] | None = None
        for each in self._whole_from_the_newest():
            state = self.state(each)
            best = state.get("best", {}) if best is None else best
            if name == LATEST:
                return each
            if name in best and self.is_whole(best[name]):
                return best[name]
            phase = state.get("phase_name") if state.get("permanent") else None
            if phase == name:
                return each
            ends += [phase] if isinstance(phase, str) else []
        if best is None:
            remedy = "check the URL: give s3://…/RUN@NAME, as checkpoint.upload names RUN"
            raise InputError(self.url, "there is no whole checkpoint", remedy)
        known = [*dict.fromkeys(reversed(ends)), LATEST, *best, *self.names()]
        problem = "there is no such checkpoint"
        raise InputError(f"{self.url}@{name}", problem, hint(name, known, "there are"))

    def _whole_from_the_newest(self) -> Iterator[str]:
        return (name for name in reversed(self.names()) if self.is_whole(name))

    def _listed(self) -> list[str]:
        kinds = list_folder(joined(self.url, CHECKPOINTS))
        return [name for name, kind in kinds.items() if kind == "directory"]


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
