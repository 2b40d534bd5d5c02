"""The checkpoints of a run: each appears whole or not at all, and is verified before it is used.

A checkpoint is a directory `step-XXXXXXXX` of the files that its writer put there, beside

    state.json      where the run stood; the writer's own words
    manifest.json   size and digest of every other file

All ranks write into a directory aside; when everything is on the disk, rank 0 renames it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megaphase.errors import InputError
from megaphase.files import (
    describe_file,
    file_damage,
    fsync_path,
    publish_directory,
    write_json_whole,
)
from megaphase.parallel.topology import Topology

STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint and what its writer said about it."""

    folder: Path
    state: dict[str, Any]


class CheckpointStore:
    """The directory in which a run's checkpoints lie; every method is called by all ranks."""

    def __init__(self, folder: Path, topology: Topology) -> None:
        self.folder = folder
        self._topology = topology

    def save(
        self, step: int, write: Callable[[Path], None], state: dict[str, Any], *, keep: int
    ) -> Path:
        """Write a checkpoint, then remove all but the newest `keep` and the permanent ones.

        `write` is called by all ranks with the directory aside. A state with `permanent: true`
        keeps its checkpoint for ever.
        """
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / f".{final.name}.partial"
        if self._topology.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*"):
                shutil.rmtree(leftover)
            aside.mkdir()
        dist.barrier()
        write(aside)
        dist.barrier()
        files = self._describe_together(aside)
        if self._topology.is_first:
            write_json_whole(aside / STATE_FILE, state)
            files[STATE_FILE] = describe_file(aside / STATE_FILE)
            write_json_whole(aside / MANIFEST_FILE, {"files": files})
            if final.exists():  # a run that went on from an older checkpoint comes by again
                _remove(final)
            publish_directory(aside, final)
            self._prune(keep)
        dist.barrier()
        return final

    def newest_whole(self, say: Callable[[str], object]) -> Checkpoint | None:
        """The newest checkpoint whose every byte is as it was written.

        `say` gets a sentence, on rank 0, about every newer one that is damaged.
        """
        names = [self._names() if self._topology.is_first else None]
        dist.broadcast_object_list(names, src=0)
        for name in reversed(names[0] or []):
            folder = self.folder / name
            problem = self._damage(folder)
            if problem is None:
                return Checkpoint(folder, _read_state(folder))
            if self._topology.is_first:
                say(f"{problem}; going back to the checkpoint before")
        return None

    def open(self, folder: Path) -> Checkpoint:
        """One checkpoint, wherever it lies.

        Raises:
            InputError: it is not a checkpoint, or a file of it is missing or has been altered.
        """
        if not (folder / MANIFEST_FILE).is_file():
            raise InputError(folder, "this is not a checkpoint", "give a step-… directory")
        problem = self._damage(folder)
        if problem is not None:
            raise InputError("", problem, "use another checkpoint")
        return Checkpoint(folder, _read_state(folder))

    def _names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def _mine(self, names: list[str]) -> list[str]:
        """The rank's share of files to read through."""
        return names[self._topology.rank :: self._topology.world_size]

    def _describe_together(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Force all files to the disk and describe them; the ranks share the work."""
        names = sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
        )
        mine = {}
        for name in self._mine(names):
            fsync_path(folder / name)
            mine[name] = describe_file(folder / name)
        parts: list[dict[str, dict[str, Any]]] = [{}] * self._topology.world_size
        dist.all_gather_object(parts, mine)
        return {name: facts for part in parts for name, facts in part.items()}

    def _damage(self, folder: Path) -> str | None:
        """The first fault that any rank finds, or None; the ranks share the reading."""
        try:
            files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
            mine = self._mine(sorted(files))
            found = next(filter(None, (_fault(folder / n, files[n]) for n in mine)), None)
        except (OSError, ValueError, KeyError, TypeError):
            found = f"{folder / MANIFEST_FILE}: is missing or damaged"
        faults: list[str | None] = [None] * self._topology.world_size
        dist.all_gather_object(faults, found)
        return next(filter(None, faults), None)

    def _prune(self, keep: int) -> None:
        for name in self._names()[:-keep]:
            folder = self.folder / name
            try:
                permanent = _read_state(folder).get("permanent")
            except (OSError, ValueError):
                permanent = False
            if not permanent:
                _remove(folder)


def _read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE_FILE).read_text())


def _fault(path: Path, described: dict[str, Any]) -> str | None:
    damage = file_damage(path, described)
    return None if damage is None else f"{path}: {damage}"


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that no half of it is ever taken for whole."""
    doomed = folder.with_name(f".{folder.name}.removed")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
