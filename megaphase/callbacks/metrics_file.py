"""The run's record: `metrics.jsonl`, a JSON object a line, and the same in TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaphase.utils.errors import RunError
from megaphase.utils.files import HASH_CHUNK_BYTES, new_hash, os_errors_named, write_all
from megaphase.utils.metrics_rows import Row

TRAINING_SCALARS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "save_seconds",
    "mfu",
)


class MetricsLog:
    """Appends rows of training, validation and events; used by rank 0 only.

    Opening it for a run that resumes cuts off what was written after the checkpoint; for one that
    begins anew, all of it, with what TensorBoard shows.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep_bytes: int,
        tensorboard: Path | None,
        resumed_step: int | None,
    ) -> None:
        """
        Args:
            keep_bytes: how much of the file belongs to the checkpoint that the run resumes from.
            tensorboard: directory of TensorBoard's files, None for none.
            resumed_step: of that checkpoint; what TensorBoard has beyond is hidden. None where the
                run begins anew.
        """
        self._path = path
        with os_errors_named(path):
            path.touch()
            # Unbuffered: a row that could not be written is not tried again when it is closed.
            self._file = open(path, "rb+", buffering=0)  # noqa: SIM115  # open for a whole run
            self._file.truncate(keep_bytes)
            self._digest = new_hash()
            while chunk := self._file.read(HASH_CHUNK_BYTES):
                self._digest.update(chunk)
        self._board = None if tensorboard is None else _Board(tensorboard, resumed_step)

    def write(self, row: Row) -> None:
        """Append one row; numbers that JSON does not have become null.

        Raises:
            RunError: the disk is full, or the like.
        """
        line = json.dumps(_finite(row), ensure_ascii=False).encode() + b"\n"
        with os_errors_named(self._path):
            write_all(self._file.fileno(), line)
        self._digest.update(line)
        if self._board is not None:
            self._board.write(row)

    def sync(self) -> dict[str, Any]:
        """Force all rows to the disk; `metrics_bytes` and `metrics_hash`, for a checkpoint's state.

        Raises:
            RunError: the disk is full, or the like.
        """
        with os_errors_named(self._path):
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()
        return {
            "metrics_bytes": self._file.tell(),
            "metrics_hash": self._digest.hexdigest(),
        }

    def close(self) -> None:
        """Write out and close everything, as far as the disk takes it."""
        with suppress(RunError):  # said already, or of rows that a resumed run writes again
            self.sync()
        self._file.close()
        if self._board is not None:
            self._board.close()


class _Board:
    """TensorBoard's files: every value is in them once for its step.

    A resumed run hides what was written after its checkpoint: `purge_step` makes TensorBoard drop
    values of that step and of later ones from the files before. A run that begins anew removes
    them.
    """

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with os_errors_named(folder):
            before = list(folder.glob("events.out.tfevents.*"))
            if resumed_step is None:
                for path in before:
                    path.unlink()
            first = 0 if resumed_step is None else resumed_step + 1
            self._writer = SummaryWriter(str(folder), purge_step=first if before else None)
        self._folder = folder
        self._validated = resumed_step if before else None

    def write(self, row: Row) -> None:
        """Add a row's numbers; those that two phases share at a switch are added once."""
        if "validation" in row:
            if row["step"] == self._validated:
                return
            self._validated = row["step"]
        with os_errors_named(self._folder):
            for name, value in _scalars(row):
                self._writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        with os_errors_named(self._folder):
            self._writer.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._writer.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    """The row's numbers under the names that TensorBoard shows."""
    if "validation" in row:
        for task, figures in row["validation"].items():
            for name, value in figures.items():
                if value is not None:
                    yield f"validation_{name}/{task}", value
    elif "loss_by_task" in row:  # events, too, may tell a loss
        for task, loss in row["loss_by_task"].items():
            yield f"train_loss/{task}", loss
        for name in TRAINING_SCALARS:
            if row[name] is not None:
                yield f"train/{name}", row[name]
