"""Upload a run's checkpoints to an object store, while it trains.

A thread of rank 0 copies whole checkpoints, the newest first, and compares size and hash of what
lies in the store with the checkpoint's manifest, which it writes last.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaphase.checkpoint.claim import Claim
from megaphase.checkpoint.remote import RemoteRun
from megaphase.checkpoint.state import (
    MANIFEST_FILE,
    checkpoint_folders,
    state_or_nothing,
    step_of,
)
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import file_damage, read_file
from megaphase.utils.remote_calls import Pending, RemoteError
from megaphase.utils.remote_files import (
    describe,
    hash_remote,
    joined,
    list_folder,
    read_bytes,
    upload,
    write_bytes,
)

# How long a start waits to learn whether the store can be used.
CLAIM_SECONDS = 20.0
# Before a checkpoint is tried again that could not be uploaded; doubled each time, up to the limit.
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 30.0, 600.0
_ATTEMPTS_PER_FILE = 2  # where another content arrives than was sent


class Uploader:
    """Uploads the checkpoints of a run, one at a time; only rank 0 has one."""

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        key: str,
        plan: str,
        keep: int,
        wait_seconds: float = 300.0,
        say: Callable[[str], object],
    ) -> None:
        """
        Args:
            folder: the run's checkpoints on this machine.
            url: of the run in the store.
            key: of the run file that names it, for messages.
            plan: fingerprint of the run's plan.
            keep: how many of the newest checkpoints are kept in the store.
            wait_seconds: how long the end of the run waits while no byte moves.
            say: called with sentences about uploads, also by the thread.
        """
        self._folder, self._run = folder, RemoteRun(url)
        self._claim = Claim(self._run, folder, key=key, plan=plan)
        self._keep, self._wait_seconds, self._say = keep, wait_seconds, say
        self._changed = threading.Condition()
        self._waiting: set[str] = set()
        self._current: str | None = None
        self._failed: dict[str, str] = {}  # why the newest attempt failed
        self._is_claimed = False
        self._not_before, self._pause = 0.0, PAUSE_SECONDS
        self._is_last_chance = self._is_started = self._has_given_up = False
        self._moved_at = 0.0  # when a byte last moved, or a request ended

    def claim(self) -> None:
        """Claim the folder in the store, which is tried again later if it cannot be reached now.

        Raises:
            InputError: it holds the checkpoints of another run, or the store cannot be used.
        """
        claim = Pending(self._make_claim)
        try:
            if claim.is_done(CLAIM_SECONDS):
                claim.result()
            else:
                self._say(
                    f"{self._run.url}: no answer yet; checkpoints are uploaded when it answers"
                )
        except RemoteError as error:
            self._say(f"{error}; uploads are tried again while the run trains")

    def start(self) -> None:
        """Begin to upload the checkpoints that are there and not in the store yet."""
        with self._changed:
            for kind in ("step", "best"):
                for folder in checkpoint_folders(self._folder, kind):
                    if (folder / MANIFEST_FILE).is_file():
                        self._waiting.add(folder.name)
            self._is_started = True
        threading.Thread(target=self._work, name="uploader", daemon=True).start()

    def add(self, name: str) -> None:
        """Upload a checkpoint that has been published."""
        with self._changed:
            self._waiting.add(name)
            self._not_before = 0.0
            self._changed.notify_all()

    @contextmanager
    def holding(self) -> Iterator[set[str]]:
        """Begin no upload within the block, and give the names of those under way: they must not be
        removed."""
        with self._changed:
            yield set() if self._current is None else {self._current}

    def hurry(self) -> None:
        """Try everything that is left once more, without pauses: the run is over."""
        with self._changed:
            self._is_last_chance, self._not_before = True, 0.0
            self._has_given_up, self._moved_at = False, time.monotonic()
            self._failed.clear()
            self._drop_removed()
            left = self._waiting | ({self._current} if self._current else set())
            if left:
                names = ", ".join(reversed(_newest_first(left)))
                self._say(f"uploading to {self._run.url} before the end: {names}")
            self._changed.notify_all()

    @property
    def is_busy(self) -> bool:
        """Whether something may still be uploaded, after `hurry`: something is left that has not
        failed, and the store has not been silent for `wait_seconds`."""
        with self._changed:
            self._drop_removed()
            if self._current is None and not self._waiting - self._failed.keys():
                return False
            silent_seconds = time.monotonic() - self._moved_at
            self._has_given_up = self._has_given_up or silent_seconds >= self._wait_seconds
            return not self._has_given_up

    def close(self) -> None:
        """Say what has not been uploaded."""
        with self._changed:
            if not self._is_started:
                return
            self._drop_removed()
            current = {self._current} if self._current else set()
            left = _newest_first(self._waiting | current)
        if left:
            reason = next((f" ({self._failed[n]})" for n in left if n in self._failed), "")
            if self._has_given_up:
                reason = f" (no byte has moved for {self._wait_seconds:g} s)"
            self._say(
                f"not uploaded to {self._run.url}: {', '.join(reversed(left))}{reason}; the same "
                "command uploads them"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                name = self._next()
                while name is None:
                    self._changed.wait(1.0)
                    name = self._next()
                self._current = name
                self._waiting.discard(name)
            problem = self._try(name)
            with self._changed:
                self._current = None
                if problem is None:
                    self._failed.pop(name, None)
                    self._pause = PAUSE_SECONDS
                else:
                    self._waiting.add(name)
                    is_new = self._failed.get(name) != problem
                    self._failed[name] = problem
                    self._not_before = time.monotonic() + self._pause
                    self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
                self._changed.notify_all()
            if problem is not None and is_new and not self._is_last_chance:
                self._say(f"{name} is not uploaded yet: {problem}; it is tried again")

    def _next(self) -> str | None:
        """Return the checkpoint to upload now, the newest first; None if there is none."""
        self._drop_removed()
        waiting = self._waiting
        if self._is_last_chance:
            waiting = waiting - self._failed.keys()
        elif time.monotonic() < self._not_before:
            return None
        return next(iter(_newest_first(waiting)), None)

    def _drop_removed(self) -> None:
        """Forget checkpoints that were removed here before their turn, and say so."""
        gone = {name for name in self._waiting if not (self._folder / name).is_dir()}
        self._waiting -= gone
        for name in sorted(gone):
            self._failed.pop(name, None)
            self._say(f"{name} is not uploaded: checkpoint.keep removed it before its turn")

    def _try(self, name: str) -> str | None:
        """Upload a checkpoint; return why that failed, or None."""
        try:
            if not self._is_claimed:
                self._make_claim()
            self._claim.confirm()
            if self._upload(name):
                self._say(f"uploaded: {self._run.folder(name)}")
            self._prune(name)
        except (InputError, RunError) as error:
            return str(error)
        except Exception as error:  # the thread must live on, whatever a library raises
            return f"{type(error).__name__}: {error}"
        return None

    def _make_claim(self) -> None:
        self._claim.make()
        self._is_claimed = True

    def _note_progress(self, count: int = 0) -> None:
        self._moved_at = time.monotonic()

    def _upload(self, name: str) -> bool:
        """Upload and verify a checkpoint; return False if it is there already."""
        folder, url = self._folder / name, self._run.folder(name)
        manifest = read_file(folder / MANIFEST_FILE)
        there = self._run.manifest(name)
        if there == manifest:
            return False
        if there is not None:
            self._run.remove(name)
        files: dict[str, dict[str, Any]] = json.loads(manifest)["files"]
        present = list_folder(url)
        for file in sorted(files):
            self._upload_file(folder / file, joined(url, file), files[file], file in present)
        self._claim.confirm()
        write_bytes(joined(url, MANIFEST_FILE), manifest)
        if read_bytes(joined(url, MANIFEST_FILE)) != manifest:
            raise RemoteError(f"{joined(url, MANIFEST_FILE)}: is not what was uploaded")
        return True

    def _upload_file(self, path: Path, url: str, described: dict[str, Any], is_there: bool) -> None:
        """Upload a file, unless it was by an earlier start, and compare it with the manifest."""
        if is_there and _remote_damage(url, described, self._note_progress) is None:
            return
        damage = None
        for _ in range(_ATTEMPTS_PER_FILE):
            upload(path, url, self._note_progress)
            self._note_progress()
            damage = _remote_damage(url, described, self._note_progress)
            if damage is None:
                return
        local = file_damage(path, described)
        if local is not None:
            raise RunError(f"{path}: {local}")
        raise RemoteError(f"{url}: {damage} after it was uploaded {_ATTEMPTS_PER_FILE} times")

    def _prune(self, uploaded: str) -> None:
        """Remove checkpoints from the store that `keep` does not keep: all but the newest, those at
        the end of a phase, those that are on this machine, and the best of these."""
        last = step_of(uploaded)
        if last is None:
            return
        full = [name for name in self._run.names() if (step_of(name) or 0) <= last]
        bests = [name for name in self._run.names("best") if (step_of(name, "best") or 0) <= last]
        here = {f.name for kind in ("step", "best") for f in checkpoint_folders(self._folder, kind)}
        whole = [name for name in full if name in here or self._run.is_whole(name)]
        kept = here | set(whole[-self._keep :])
        kept |= {name for name in whole if name not in kept and self._state(name).get("permanent")}
        for name in list(kept):
            kept |= set(self._state(name).get("best", {}).values())
        for name in (*full, *bests):
            if name not in kept:
                self._run.remove(name)

    def _state(self, name: str) -> dict[str, Any]:
        return state_or_nothing(self._folder / name) or self._run.state(name)


def _newest_first(names: set[str]) -> list[str]:
    """Order by step; those from which a run can resume come before best weights."""

    def rank(name: str) -> tuple[bool, int]:
        step = step_of(name)
        return step is not None, step if step is not None else step_of(name, "best") or 0

    return sorted(names, key=rank, reverse=True)


def _remote_damage(
    url: str, described: dict[str, Any], advance: Callable[[int], object]
) -> str | None:
    """Return how a file in the store differs from its description in a manifest, or None."""
    file = describe(url)
    if file.size != described["bytes"]:
        return f"has {file.size:,} bytes, not {described['bytes']:,},"
    return None if hash_remote(file, advance) == described["hash"] else "has another content"
