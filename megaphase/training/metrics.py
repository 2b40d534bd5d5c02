"""The run's record: `metrics.jsonl`, a JSON object a line, and the same in TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaphase.errors import RunError
from megaphase.files import os_errors_named, write_all

Row = dict[str, Any]

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

    Opening it for a run that goes on cuts off what was written after the checkpoint.
    """

    def __init__(self, path: Path, *, keep_bytes: int, tensorboard: Path | None, step: int) -> None:
        """
        Args:
            keep_bytes: how much of the file belongs to the checkpoint that the run goes on from.
            tensorboard: directory of TensorBoard's files, None for none.
            step: steps already done; what TensorBoard has beyond is hidden.
        """
        self._path = path
        with os_errors_named(path):
            path.touch()
            # Unbuffered: a row that could not be written is not tried again when it is closed.
            self._file = open(path, "rb+", buffering=0)  # noqa: SIM115  # open for a whole run
            self._file.truncate(keep_bytes)
            self._file.seek(keep_bytes)
        self._board = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)

    def write(self, row: Row) -> None:
        """Append one row; numbers that JSON does not have become null.

        Raises:
            RunError: the disk is full, or the like.
        """
        line = json.dumps(_finite(row), ensure_ascii=False).encode() + b"\n"
        with os_errors_named(self._path):
            write_all(self._file.fileno(), line)
        if self._board is not None:
            with os_errors_named(Path(self._board.log_dir)):
                for name, value in _scalars(row):
                    self._board.add_scalar(name, value, row["step"])

    def sync(self) -> int:
        """Force all rows to the disk; returns the file's size in bytes.

        Raises:
            RunError: the disk is full, or the like.
        """
        with os_errors_named(self._path):
            os.fsync(self._file.fileno())
        if self._board is not None:
            with os_errors_named(Path(self._board.log_dir)):
                self._board.flush()
        return self._file.tell()

    def close(self) -> None:
        """Write out and close everything, as far as the disk takes it."""
        with suppress(RunError):  # said already, or of rows that a run that goes on writes again
            self.sync()
        self._file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()


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
    elif "loss" in row:
        for task, loss in row["loss_by_task"].items():
            yield f"train_loss/{task}", loss
        for name in TRAINING_SCALARS:
            if row[name] is not None:
                yield f"train/{name}", row[name]
