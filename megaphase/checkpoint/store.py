"""The checkpoints of a run: each is published atomically, and verified before it is used.

A checkpoint is a directory `step-XXXXXXXX`, or `best-XXXXXXXX` for weights alone, with

    shard-RRRRR.safetensors   the pieces of one rank
    parameters.json           their positions: see megaphase.checkpoint.parameters
    state.json                the training state
    manifest.json             size and hash of every other file

All ranks write into a temporary directory; when everything is on disk, rank 0 renames it. Links
point to some checkpoints: `latest`, and `best-TASK` and `best-mean`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from megaphase.checkpoint.fetch import remedy_for_damage
from megaphase.checkpoint.names import not_a_checkpoint
from megaphase.checkpoint.parameters import INDEX_FILE
from megaphase.checkpoint.state import (
    MANIFEST_FILE,
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

# The names of files that this program has not finished writing or removing.
_LEFTOVER = re.compile(r"\.(.+\.(partial|link)|(step|best)-[0-9]{8,}\.removed)")


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint and its state."""

    folder: Path
    state: dict[str, Any]


class CheckpointStore:
    """The directory with a run's checkpoints."""

    def __init__(
        self, folder: Path, control_group: ControlGroup, say: Say = say_on_standard_error
    ) -> None:
        """say: called on rank 0 with a sentence about any unexpected file at a checkpoint's
        path."""
        self.folder = folder
        self._control_group = control_group
        self._say = say

    def begin(self, name: str, needed_bytes: int) -> Path:
        """Create the temporary directory for a checkpoint; called by all ranks.

        needed_bytes: of all ranks together.

        Raises:
            RunError: on all ranks; the folder cannot be written, or the disk has too little space.
        """
        aside = self._aside(name)
        self._control_group.on_first_rank(lambda: self._make(aside, needed_bytes))
        return aside

    def publish(
        self, name: str, index: Mapping[str, Any], state: Mapping[str, Any], files: dict[str, Any]
    ) -> Path:
        """Publish the checkpoint and let `latest` point to it; called on rank 0 alone.

        files: the manifest's descriptions of the shards in the temporary directory.
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
        """Remove the temporary directory of a checkpoint."""
        remove_directory(self._aside(name))

    def link(self, alias: str, name: str) -> None:
        """Make a link point to a checkpoint, atomically."""
        aside, final = self.folder / f".{alias}.link", self.folder / alias
        remove_leftover(aside, self._say)
        aside.symlink_to(name)
        if os.path.lexists(final) and not final.is_symlink():
            self._clear(final)  # the run may have been copied by a program that follows links
        os.replace(aside, final)
        fsync_path(self.folder)

    def prune(
        self,
        keep: int,
        best: Mapping[str, str],
        saved: str,
        sound_step: int | None = None,
        uploading: Collection[str] = (),
    ) -> None:
        """Remove all but the newest `keep` checkpoints, the permanent ones, and the best weights.

        best: the names of the currently best ones; those that a run would count as best after it
            has
        resumed from one of the newest are kept too. saved: the checkpoint that was just published;
        those of later steps are damaged, or the run would have resumed from them. They do not
        count, and are kept until training reaches them. sound_step: given while training seems to
        diverge; the newest checkpoint of this step or an earlier one is kept too. uploading: names
        of checkpoints that are being copied to a store, which are kept as well.
        """
        last = step_of(saved, saved.partition("-")[0])
        assert last is not None
        full = [name for name in self._names("step") if (step_of(name) or 0) <= last]
        kept = {*full[-keep:], *best.values(), *uploading}
        if sound_step is not None:
            kept |= set(_until(full, sound_step)[-1:])
        for name in full[-keep:]:
            kept |= set(state_or_nothing(self.folder / name).get("best", {}).values())
        for name in (*full, *self._names("best")):
            folder = self.folder / name
            if name not in kept and not state_or_nothing(folder).get("permanent"):
                remove_directory_at_once(folder)

    def prepare(self, best: Mapping[str, str]) -> None:
        """Before a run trains: remove a killed process's temporary files, move aside other files
        with names that the run will use, and set the `best-…` links.

        Raises:
            RunError: the folder cannot be created or written; better now than at the first save.
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
        """Return the newest checkpoint with no altered byte, or None if none has been saved;
        called by all ranks.

        `say` is called on rank 0 with a sentence about every newer one that is damaged, and about
        every other file with the name of a checkpoint.

        Raises:
            InputError: all existing checkpoints are damaged. No kill can cause that, so it is for
                the user to decide whether to start again and overwrite the run's record.
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
                        say(f"{other}; it is ignored")
                return self._verified(folder)
            if self._control_group.rank == 0 and name != names[0]:
                say(f"{problem}; going back to the checkpoint before")
        problem = problem or next(iter(others), None)
        if problem is not None:
            raise InputError(
                "",
                f"{problem}, and no other checkpoint there is intact",
                f"put one back, or remove {self.folder} to start again",
            )
        return None

    def open(self, folder: Path) -> Checkpoint:
        """Verify and return one checkpoint, in any folder; called by all ranks.

        Raises:
            InputError: it is not a checkpoint, or one of its files is missing or has been altered.
        """
        if not self._control_group.on_first_rank((folder / MANIFEST_FILE).is_file):
            raise not_a_checkpoint(folder, folder)
        problem = self._damage(folder)
        if problem is not None:
            raise InputError("", problem, remedy_for_damage(folder))
        return self._verified(folder)

    def _verified(self, folder: Path) -> Checkpoint:
        return Checkpoint(folder, self._control_group.on_first_rank(partial(read_state, folder)))

    def newest_name(self, until: int | None = None) -> str | None:
        """Return the newest checkpoint from which a run could resume, of step `until` or earlier if
        given, for messages.

        Its manifest can be read; its other files are not checked.
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
        """Remove an older or damaged checkpoint; set aside anything else."""
        if final.is_dir() and not final.is_symlink() and (final / MANIFEST_FILE).is_file():
            remove_directory_at_once(final)
        else:
            set_aside(final, "a checkpoint", self._say)

    def _names(self, kind: str) -> list[str]:
        """Return the names of the checkpoints written by this program, in the order of their
        steps."""
        folders = checkpoint_folders(self.folder, kind)
        return [folder.name for folder in folders if (folder / MANIFEST_FILE).is_file()]

    def _candidates(self) -> tuple[list[str], list[str]]:
        """Return the names of the directories that may be valid checkpoints, by step, and
        descriptions of other files with the name of a checkpoint."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            kind = kind_of(self.folder)
            problem = "points nowhere" if kind == "a symbolic link" else f"is {kind}"
            return [], [f"{shown_path(self.folder)}: {problem}, where a run has its checkpoints"]
        names = [folder.name for folder in checkpoint_folders(self.folder)]
        others = []
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                if step_of(path.name) is not None and path.name not in names:
                    others.append(f"{path}: is {kind_of(path)}, not a checkpoint")
        return names, others

    def _damage(self, folder: Path) -> str | None:
        """Return the first fault that any rank finds, or None; the ranks share the reading."""
        files = self._control_group.on_first_rank(partial(_manifest_of, folder))
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
    """Write the files of a checkpoint other than its shards.

    files: the manifest's descriptions of the shards, which are already in the folder.
    """
    for file, content in ((INDEX_FILE, index), (STATE_FILE, state)):
        atomic_write_json(folder / file, content)
        files = {**files, file: describe_file(folder / file)}
    atomic_write_json(folder / MANIFEST_FILE, {"files": files})


def _until(names: list[str], step: int) -> list[str]:
    return [name for name in names if (step_of(name) or 0) <= step]


def _manifest_of(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return the manifest's description of every file; None if it is missing or damaged."""
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
