"""The checkpoints of a run: each appears whole or not at all, and is verified before it is used.

A checkpoint is a directory `step-XXXXXXXX`, or `best-XXXXXXXX` for weights alone, of

    shard-RRRRR.safetensors   what each rank held, and
    parameters.json           where it belongs: see megaphase.checkpoint.parameters
    state.json                where the run stood; its writer's own words
    manifest.json             size and hash of every other file

All ranks write into a directory aside; when everything is on the disk, rank 0 renames it. Links
lead to some: `latest`, and `best-TASK` and `best-mean`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from megaphase.checkpoint.parameters import INDEX_FILE
from megaphase.checkpoint.state import (
    NAME,
    STATE_FILE,
    checkpoint_folders,
    read_state,
    state_or_nothing,
    step_of,
)
from megaphase.distributed.control_group import ControlGroup
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import (
    atomic_write_json,
    describe_file,
    file_damage,
    fsync_path,
    os_errors_named,
    publish_directory,
    read_json,
    remove_directory,
    remove_directory_at_once,
)
from megaphase.utils.names import LATEST
from megaphase.utils.set_aside import (
    Say,
    kind_of,
    remove_leftover,
    say_on_standard_error,
    set_aside,
    shown_path,
)

MANIFEST_FILE = "manifest.json"
# What this program calls what it has not finished to write, or to remove.
_LEFTOVER = re.compile(r"\.(.+\.(partial|link)|(step|best)-[0-9]{8,}\.removed)")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint and what its writer said about it."""

    folder: Path
    state: dict[str, Any]


class CheckpointStore:
    """The directory in which a run's checkpoints lie."""

    def __init__(
        self, folder: Path, control_group: ControlGroup, say: Say = say_on_standard_error
    ) -> None:
        """say: gets a sentence, on rank 0, about whatever lay in the way of a checkpoint."""
        self.folder = folder
        self._control_group = control_group
        self._say = say

    def begin(self, name: str, needed_bytes: int) -> Path:
        """Make the directory aside for a checkpoint; called by all ranks.

        needed_bytes: of all ranks together.

        Raises:
            RunError: on all ranks; the folder cannot be written, or has not so much space.
        """
        aside = self._aside(name)
        self._control_group.on_first_rank(lambda: self._make(aside, needed_bytes))
        return aside

    def publish(
        self, name: str, index: Mapping[str, Any], state: Mapping[str, Any], files: dict[str, Any]
    ) -> Path:
        """Make the checkpoint appear, with `latest` leading to it; on rank 0 alone.

        files: what a manifest says of the shards that lie in the directory aside.
        """
        aside, final = self._aside(name), self.folder / name
        complete(aside, index, state, files)
        if os.path.lexists(final):
            self._clear(final)
        publish_directory(aside, final)
        if name.startswith("step-"):
            self.link(LATEST, name)
        return final

    def discard(self, name: str) -> None:
        """Remove what was written aside for a checkpoint."""
        remove_directory(self._aside(name))

    def link(self, alias: str, name: str) -> None:
        """Let a link lead to a checkpoint, in one step."""
        aside, final = self.folder / f".{alias}.link", self.folder / alias
        remove_leftover(aside, self._say)
        aside.symlink_to(name)
        if os.path.lexists(final) and not final.is_symlink():
            self._clear(final)  # perhaps the run was copied by a program that follows links
        os.replace(aside, final)
        fsync_path(self.folder)

    def prune(
        self, keep: int, best: Mapping[str, str], saved: str, sound_step: int | None = None
    ) -> None:
        """Remove all but the newest `keep` checkpoints, the permanent ones, and the best weights.

        best: the names of those that are the best now; those that a run would count as best after
        it has gone on from one of the newest stay, too. saved: the one that has just appeared;
        those of later steps are damaged, or the run would have gone on from them. They do not
        count, and stay until it comes by. sound_step: given while training seems to diverge; the
        newest checkpoint that is not of a later step stays, too.
        """
        last = step_of(saved, saved.partition("-")[0])
        assert last is not None
        full = [name for name in self._names("step") if (step_of(name) or 0) <= last]
        kept = {*full[-keep:], *best.values()}
        if sound_step is not None:
            kept |= set(_until(full, sound_step)[-1:])
        for name in full[-keep:]:
            kept |= set(state_or_nothing(self.folder / name).get("best", {}).values())
        for name in (*full, *self._names("best")):
            folder = self.folder / name
            if name not in kept and not state_or_nothing(folder).get("permanent"):
                remove_directory_at_once(folder)

    def prepare(self, best: Mapping[str, str]) -> None:
        """Before a run trains: remove what a killed process left aside, rename what else has the
        name of something that the run will write, and set `best-…` links.

        Raises:
            RunError: the folder cannot be made or written; better now than at the first save.
        """
        with os_errors_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=self.folder).close()
            for path in list(self.folder.iterdir()):
                if _LEFTOVER.fullmatch(path.name):
                    remove_leftover(path, self._say)
                elif NAME.fullmatch(path.name) and kind_of(path) != "a directory":
                    set_aside(path, "a checkpoint", self._say)
            for alias, name in best.items():
                self.link(alias, name)

    def newest_whole(self, say: Callable[[str], object]) -> Checkpoint | None:
        """The newest checkpoint whose every byte is as it was written, None where none has been
        saved; called by all ranks.

        `say` gets a sentence, on rank 0, about every newer one that is damaged, and about whatever
        else has the name of a checkpoint.

        Raises:
            InputError: all that there are are damaged. No kill leaves that behind: to begin anew,
                and write over the run's record, is for the user to decide.
        """
        mine = self._candidates() if self._control_group.rank == 0 else ([], [])
        names, others = self._control_group.gather(mine)[0]
        problem = None
        for name in reversed(names):
            folder = self.folder / name
            problem = self._damage(folder)
            if problem is None:
                if self._control_group.rank == 0:
                    for other in others:
                        say(f"{other}; it is passed over")
                return Checkpoint(folder, read_state(folder))
            if self._control_group.rank == 0 and name != names[0]:
                say(f"{problem}; going back to the checkpoint before")
        problem = problem or next(iter(others), None)
        if problem is not None:
            raise InputError(
                "",
                f"{problem}, and no other checkpoint there is whole",
                f"put one back, or remove {self.folder} to begin anew",
            )
        return None

    def open(self, folder: Path) -> Checkpoint:
        """One checkpoint, wherever it lies, after it has been verified; called by all ranks.

        Raises:
            InputError: it is not a checkpoint, or a file of it is missing or has been altered.
        """
        if not (folder / MANIFEST_FILE).is_file():
            raise InputError(folder, "this is not a checkpoint", "give a step-… directory")
        problem = self._damage(folder)
        if problem is not None:
            raise InputError("", problem, "use another checkpoint")
        return Checkpoint(folder, read_state(folder))

    def newest_name(self, until: int | None = None) -> str | None:
        """The newest checkpoint that a run could resume from, or that is not of a later step, for
        messages.

        Its manifest can be read; its other files are not looked at.
        """
        names = [
            folder.name
            for folder in checkpoint_folders(self.folder)
            if _manifest_of(folder) is not None
        ]
        return next(reversed(names if until is None else _until(names, until)), None)

    def _aside(self, name: str) -> Path:
        return self.folder / f".{name}.partial"

    def _make(self, aside: Path, needed_bytes: int) -> None:
        with os_errors_named(aside):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftover(aside, self._say)
            free = shutil.disk_usage(self.folder).free
            if needed_bytes > free:
                raise RunError(
                    f"{self.folder}: the checkpoint needs {needed_bytes / 1e9:,.3f} GB, the disk "
                    f"has {free / 1e9:,.3f} GB left"
                )
            aside.mkdir()

    def _clear(self, final: Path) -> None:
        """Remove an older or damaged checkpoint; set aside what is none."""
        if final.is_dir() and not final.is_symlink() and (final / MANIFEST_FILE).is_file():
            remove_directory_at_once(final)
        else:
            set_aside(final, "a checkpoint", self._say)

    def _names(self, kind: str) -> list[str]:
        """Of the checkpoints that this program has written, in the order of their steps."""
        folders = checkpoint_folders(self.folder, kind)
        return [folder.name for folder in folders if (folder / MANIFEST_FILE).is_file()]

    def _candidates(self) -> tuple[list[str], list[str]]:
        """The names of the directories that may be whole, by their steps; and in words what else
        has the name of a checkpoint."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            kind = kind_of(self.folder)
            problem = "leads nowhere" if kind == "a symbolic link" else f"is {kind}"
            return [], [f"{shown_path(self.folder)}: {problem}, where a run has its checkpoints"]
        names = [folder.name for folder in checkpoint_folders(self.folder)]
        others = []
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                if step_of(path.name) is not None and path.name not in names:
                    others.append(f"{path}: is {kind_of(path)}, not a checkpoint")
        return names, others

    def _damage(self, folder: Path) -> str | None:
        """The first fault that any rank finds, or None; the ranks share the reading."""
        files = _manifest_of(folder)
        if files is None:
            found: str | None = f"{folder / MANIFEST_FILE}: is missing or damaged"
        else:
            mine = sorted(files)[self._control_group.rank :: self._control_group.world_size]
            try:
                found = next(filter(None, (_fault(folder / n, files[n]) for n in mine)), None)
            except (OSError, ValueError, KeyError, TypeError) as error:
                found = f"{folder}: cannot be read ({getattr(error, 'strerror', None) or error})"
        return next(filter(None, self._control_group.gather(found)), None)


def complete(
    folder: Path, index: Mapping[str, Any], state: Mapping[str, Any], files: dict[str, Any]
) -> None:
    """Write what a checkpoint has beside its shards.

    files: what a manifest says of the shards, which lie in the folder already.
    """
    for file, content in ((INDEX_FILE, index), (STATE_FILE, state)):
        atomic_write_json(folder / file, content)
        files = {**files, file: describe_file(folder / file)}
    atomic_write_json(folder / MANIFEST_FILE, {"files": files})


def _until(names: list[str], step: int) -> list[str]:
    return [name for name in names if (step_of(name) or 0) <= step]


def _manifest_of(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What the manifest says of every file, None where it is missing or damaged."""
    try:
        files = read_json(folder / MANIFEST_FILE)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(files, dict) or not {STATE_FILE, INDEX_FILE} <= files.keys():
        return None
    return files


def _fault(path: Path, described: dict[str, Any]) -> str | None:
    damage = file_damage(path, described)
    return None if damage is None else f"{path}: {damage}"
