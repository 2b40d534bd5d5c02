"""Which run has a folder in an object store: `upload.json` there names it by its identity.

The identity is random, and stored in the run directory under the same name.
"""

from __future__ import annotations

import json
import secrets
import threading
from pathlib import Path
from typing import Any

from megaphase.checkpoint.remote import OWNER_FILE, RemoteRun
from megaphase.checkpoint.state import MANIFEST_FILE, checkpoint_folders
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_json, os_errors_named, read_file, read_json
from megaphase.utils.remote_calls import NO_SUCH_FILE
from megaphase.utils.remote_files import joined, write_bytes

_KINDS = ("step", "best")


class Claim:
    """The claim of a run to its folder in a store.

    Methods raise RemoteError where the store cannot be reached.
    """

    def __init__(self, run: RemoteRun, folder: Path, *, key: str, plan: str) -> None:
        """
        Args:
            folder: the run's checkpoints on this machine, in its run directory.
            key: of the run file that names the folder in the store, for messages.
            plan: fingerprint of the run's plan.
        """
        self._run, self._folder, self._key, self._plan = run, folder, key, plan
        self._file = folder.parent / OWNER_FILE
        self._lock = threading.Lock()

    def make(self) -> None:
        """Claim the folder for this run, or find that it has it.

        Raises:
            InputError: the folder holds the checkpoints of another run, or cannot be used.
        """
        try:
            with self._lock:  # an attempt that hangs may still be under way in another thread
                self._make()
        except InputError as error:
            if error.where == self._key:
                raise
            remedy = error.remedy
            if error.problem == NO_SUCH_FILE:
                protocol, _, path = self._run.url.partition("://")
                bucket = path.partition("/")[0]
                place = f"bucket {protocol}://{bucket}" if bucket else "folder"
                remedy = f"make the {place}, or check the URL"
            problem = f"{self._run.url}: {error.problem}"
            raise InputError(self._key, problem, remedy) from None

    def confirm(self) -> None:
        """Raise InputError if another run has taken the folder since it was claimed."""
        owner = self._run.owner()
        if not self._is_own(owner):
            raise self._refusal(owner or {})

    def _make(self) -> None:
        owner, own = self._run.owner(), self._identity()
        if self._is_own(owner):
            return
        if owner is not None and not self._may_take(owner):
            raise self._refusal(owner)
        if own is None:
            own = secrets.token_hex(16)
            with os_errors_named(self._file):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_json(self._file, {"run": own})
        claim = json.dumps({"plan": self._plan, "run": own})
        write_bytes(joined(self._run.url, OWNER_FILE), claim.encode())
        self.confirm()

    def _may_take(self, owner: dict[str, Any]) -> bool:
        """Whether the run may take a folder that another identity, or a run with another plan, has:
        no checkpoint lies there, or one that is in both places is the same in both, as where they
        were put back into a new run directory. An earlier version's claim is also taken where none
        is in both."""
        there = {name for kind in _KINDS for name in self._run.names(kind)}
        if owner.get("plan") != self._plan:
            return not there
        folders = [f for kind in _KINDS for f in checkpoint_folders(self._folder, kind)]
        shared = [folder for folder in folders if folder.name in there]
        if not there or not shared:
            return not there or ("run" not in owner and bool(folders))
        return any(self._run.manifest(f.name) == _manifest(f) is not None for f in shared)

    def _is_own(self, owner: dict[str, Any] | None) -> bool:
        return owner is not None and owner == {"plan": self._plan, "run": self._identity()}

    def _identity(self) -> str | None:
        """Return this run's identity; None if it has none, or the file with it is damaged."""
        try:
            found = read_json(self._file)["run"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if isinstance(found, str) else None

    def _refusal(self, owner: dict[str, Any]) -> InputError:
        remedy = "give each run a URL of its own"
        if owner.get("plan") == self._plan:
            remedy += f"; to continue that run, put its checkpoints into {self._folder}"
        problem = f"{self._run.url} holds the checkpoints of another run"
        return InputError(self._key, problem, remedy)


def _manifest(folder: Path) -> bytes | None:
    try:
        return read_file(folder / MANIFEST_FILE)
    except OSError:
        return None
