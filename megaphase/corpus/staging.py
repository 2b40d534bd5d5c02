"""Write a corpus in a staging folder, from which a killed writer can resume."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from megaphase.corpus.hashed_file import HashedFile
from megaphase.corpus.manifest import FileRecord, Manifest
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_json, remove_directory
from megaphase.utils.json_models import read_record
from megaphase.utils.locks import exclusive_lock
from megaphase.utils.set_aside import make_way_for_directory

_STATE_NAME = "state.json"
_LOCK_NAME = "lock"


class Figures(BaseModel):
    """The writer's counters; see Manifest."""

    model_config = ConfigDict(extra="forbid")

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped_empty: int = 0
    skipped_wrong: int = 0
    skipped_duplicates: int = 0


class StagingState(BaseModel):
    """`state.json`: the part of the staged files that is known to be on disk.

    Attributes:
        job: identifies what is written; staged files of another job cannot be used.
        files: size and digest of the saved part of each file.
        note: the writer's own data, returned to it when it resumes.
        manifest: the corpus's manifest, once only the renaming of the files is missing.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[3] = 3
    job: str
    files: dict[str, FileRecord]
    figures: Figures
    note: Any = None
    manifest: Manifest | None = None


class StagedCorpus:
    """Context manager for the folder `.NAME.draft` next to a corpus; one process may use it.

    If the block raises, the folder is kept only if its state was saved for a job.

    Attributes:
        state: the state that an earlier writer of the same job saved, or None.
        files: the open files by suffix.
        job: identifies what is written; an empty one is never resumed.
    """

    def __init__(self, prefix: Path, job: str) -> None:
        self.folder = _folder_of(prefix)
        self.files: dict[str, HashedFile] = {}
        self.state: StagingState | None = None
        self.job = job
        self._prefix = prefix

    def finished_manifest(self) -> Manifest | None:
        """The manifest, if the same job was killed while it renamed the files; otherwise None."""
        state = self._read_state()
        return state.manifest if state else None

    def __enter__(self) -> Self:
        make_way_for_directory(self.folder, "the staging folder of a corpus")
        with ExitStack() as opened:
            opened.callback(self._remove_empty_folder)  # last, when the lock has been removed
            opened.enter_context(exclusive_lock(self.folder / _LOCK_NAME, self._refuse))
            opened.callback(self._leave)
            self.state = self._read_state()
            if self.state is None:
                self._clear()
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def open(self, suffix: str) -> HashedFile:
        """Open a file and append after its saved part, which is read again to verify it.

        Raises InputError if that part was altered; the folder is removed then.
        """
        saved = self.state.files.get(suffix) if self.state else None
        path = self.folder / suffix
        if saved and (not path.is_file() or path.stat().st_size < saved.bytes):
            raise self._damaged(path, "is shorter than it was")
        file = self.files[suffix] = HashedFile(path, saved.bytes if saved else 0)
        if saved and file.digest != saved.hash:
            raise self._damaged(path, "has been altered")
        return file

    def save(self, figures: Figures, note: Any, manifest: Manifest | None = None) -> None:
        """Flush all files to disk and record that a later writer can resume from here."""
        self.state = StagingState(
            job=self.job,
            files={suffix: file.record() for suffix, file in self.files.items()},
            figures=figures,
            note=note,
            manifest=manifest,
        )
        atomic_write_json(self.folder / _STATE_NAME, self.state.model_dump())

    def discard(self) -> None:
        """Forget the saved state: the folder is removed when the block ends."""
        self.state = None

    def _refuse(self) -> None:
        remedy = "wait for it, or choose another --out"
        raise InputError(self._prefix, "is being written by another process", remedy)

    def _read_state(self) -> StagingState | None:
        return _read_state(self.folder, self.job)

    def _damaged(self, path: Path, problem: str) -> InputError:
        self.discard()
        return InputError(path, problem, "it is removed: run the command again to start over")

    def _clear(self) -> None:
        """Remove everything but the lock, which other processes must find as long as it is held."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                remove_directory(path)
            elif path.name != _LOCK_NAME:
                path.unlink()

    def _leave(self) -> None:
        for file in self.files.values():
            file.close()
        if self.state is None or not self.job:
            with suppress(OSError):
                self._clear()

    def _remove_empty_folder(self) -> None:
        with suppress(OSError):  # a state is saved in it, or another process has its lock there
            self.folder.rmdir()


def saved_documents(prefix: Path, job: str) -> int:
    """Return how many documents of a corpus a killed writer of this job has saved."""
    state = _read_state(_folder_of(prefix), job)
    return state.figures.documents if state else 0


def _folder_of(prefix: Path) -> Path:
    return prefix.with_name(f".{prefix.name}.draft")


def _read_state(folder: Path, job: str) -> StagingState | None:
    if not job or not (folder / _STATE_NAME).is_file():
        return None
    try:
        state = read_record(folder / _STATE_NAME, StagingState, "")
    except InputError:
        return None  # written by another version
    return state if state.job == job else None
