"""A run directory: the paths of its files, and the check that it belongs to this run file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megaphase.config.run import RunConfig
from megaphase.plan.same_run import (
    refuse_other_counts,
    refuse_other_plan,
    refuse_other_run,
    settings_of,
)
from megaphase.utils.errors import InputError, RunError, file_fault
from megaphase.utils.files import atomic_write_json, with_hash
from megaphase.utils.locks import exclusive_lock, is_locked
from megaphase.utils.run_files import (
    CHECKPOINTS,
    LOCK_FILE,
    METRICS_FILE,
    PLAN_FILE,
    RUN_FILE,
    TRACKERS,
)
from megaphase.utils.set_aside import say_on_standard_error
from megaphase.utils.slurm import is_restarted

_LOST_NODE_SECONDS = 300.0


@dataclass(frozen=True)
class RunDirectory:
    """The paths of the files in a run directory, whose content README.md describes."""

    path: Path

    @property
    def run_file(self) -> Path:
        """The run file as it was understood, with every default."""
        return self.path / RUN_FILE

    @property
    def plan_file(self) -> Path:
        """Tokens, rates and epochs per phase and task."""
        return self.path / PLAN_FILE

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def trace(self, step: int) -> Path:
        """Which samples a step saw, where something was wrong with it."""
        return self.path / "traces" / f"step-{step:08d}.jsonl"

    @property
    def profile(self) -> Path:
        """The profile of a few steps: torch's traces and their summary."""
        return self.path / "profile"

    @property
    def lock(self) -> Path:
        """Held by the process that trains here."""
        return self.path / LOCK_FILE

    @contextlib.contextmanager
    def sole_run(self, where: str) -> Iterator[None]:
        """Keeps other runs out of the directory as long as the block lasts.

        where: the file and key that name it, for messages.

        Raises:
            InputError: it cannot be written.
            RunError: another process trains in it.
        """

        def refuse() -> NoReturn:
            # Not an input error: a job that is started again may meet a process of its last start.
            raise RunError(
                f"{self.path}: another process is training in this run directory; wait until it "
                f"has ended, or choose another output; if there is none, remove {self.lock}"
            )

        # A network file system may keep the lock of a node that is lost for some minutes.
        patience = _LOST_NODE_SECONDS if is_restarted() else 0.0
        if patience and is_locked(self.lock):
            say_on_standard_error(
                f"{self.lock}: waiting up to {patience / 60:.0f} minutes for the end of the job's "
                "last start"
            )
        is_new = not self.path.exists()
        try:
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(exclusive_lock(self.lock, refuse, patience))
                except OSError as error:
                    problem = "cannot be written"
                    raise file_fault(self.path, error, "", problem, where=where) from None
                yield
        finally:
            if is_new:
                with contextlib.suppress(OSError):
                    self.path.rmdir()  # if the start was refused, nothing is in it

    def refuse_other_run(self, config: RunConfig) -> None:
        """Raise InputError, naming the first key, where another run file began this directory."""
        refuse_other_run(self.path, config)

    def refuse_other_plan(self, config: RunConfig, fingerprint: str, bos: int | None) -> None:
        """Raise InputError where the run in this directory has another BOS or other corpora."""
        refuse_other_plan(self.path, config, fingerprint, bos)

    def claim(self, config: RunConfig, plan: dict[str, Any], *, record: bool = True) -> None:
        """Write down the run file and the plan, in a directory that is new or of this run.

        record: False leaves what is written down there as it is.

        Raises:
            InputError: the corpora have changed since the run began, or the directory, or that of
                TensorBoard or of a tracker in it, cannot be written.
        """
        folders = [self.path / TRACKERS / name for name, _ in config.logging.trackers()]
        if config.logging.tensorboard:
            user, remedy = "TensorBoard's files need", "set logging.tensorboard: false"
            _refuse_no_folder(self.tensorboard, user, remedy)
        for folder in folders:
            user, remedy = f"logging.{folder.name} needs", f"leave out logging.{folder.name}"
            _refuse_no_folder(folder.parent, user, remedy)
            _refuse_no_folder(folder, user, remedy)
        self.refuse_other_plan(config, plan["fingerprint"], plan.get("bos"))
        refuse_other_counts(self.path, plan)
        try:
            for folder in (self.path, *folders):
                folder.mkdir(parents=True, exist_ok=True)
            if record:
                atomic_write_json(self.plan_file, with_hash(plan))
                atomic_write_json(self.run_file, settings_of(config))
        except OSError as error:
            where = config.where("output")
            raise file_fault(self.path, error, "", "cannot be written", where=where) from None


def _refuse_no_folder(path: Path, user: str, remedy: str) -> None:
    if os.path.lexists(path) and not path.is_dir():
        raise InputError(path, f"is no folder, which {user}", f"move it away, or {remedy}")
