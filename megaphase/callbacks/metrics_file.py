"""`metrics.jsonl`: a JSON object a line for every training step, validation and event."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaphase.callbacks.metrics_recovery import KeptMetrics, kept_metrics
from megaphase.callbacks.row_recorder import RowRecorder
from megaphase.utils.errors import RunError
from megaphase.utils.files import HASH_CHUNK_BYTES, new_hash, os_errors_named, write_all
from megaphase.utils.metrics_rows import Row
from megaphase.utils.set_aside import make_way_for_file


class MetricsFile(RowRecorder):
    """Appends to the file of a run that starts or resumes, cut to what its checkpoint has of it."""

    def __init__(self, path: Path, kept: KeptMetrics, resumed_step: int = 0) -> None:
        """
        Args:
            kept: how much of the file belongs to the checkpoint that the run resumes from.
            resumed_step: of that checkpoint.
        """
        self._path, self._kept, self._resumed_step = path, kept, resumed_step
        with os_errors_named(path):
            path.touch()
            # Unbuffered: a row that could not be written is not tried again when it is closed.
            self._file = open(path, "rb+", buffering=0)  # noqa: SIM115  # open for a whole run
            self._file.truncate(kept.bytes)
            self._digest = new_hash()
            while chunk := self._file.read(HASH_CHUNK_BYTES):
                self._digest.update(chunk)

    def on_run_begin(self) -> None:
        """Report what has happened to the file since the checkpoint."""
        if self._kept.problem is not None:
            self.run.say(self._kept.sentence(self._path))
            self.run.event(self._resumed_step, "metrics_damaged", **self._kept.event())

    def write(self, row: Row) -> None:
        """Append one row; numbers that JSON does not have become null."""
        line = json.dumps(_finite(row), ensure_ascii=False).encode() + b"\n"
        with os_errors_named(self._path):
            write_all(self._file.fileno(), line)
        self._digest.update(line)

    def on_save(self) -> dict[str, Any]:
        """Force all rows to the disk; the file's size and hash, `metrics_bytes` and `metrics_hash`.

        Raises:
            RunError: the disk is full, or the like.
        """
        with os_errors_named(self._path):
            os.fsync(self._file.fileno())
        return {
            "metrics_bytes": self._file.tell(),
            "metrics_hash": self._digest.hexdigest(),
        }

    def on_run_end(self, error: BaseException | None) -> None:
        """Force all rows to the disk, as far as it takes them, and close the file."""
        with suppress(RunError):  # already reported, or about rows that a resumed run rewrites
            self.on_save()
        self._file.close()


def open_metrics(
    path: Path, state: Mapping[str, Any] | None, first_step: int, say: Callable[[str], None]
) -> MetricsFile:
    """The file of a run that starts (`state` is None) or resumes from a checkpoint's state.

    first_step: of the run's own steps. say: is told of what is in the way.

    Raises:
        RunError: it cannot be read or written.
    """
    kept = KeptMetrics(0)
    with os_errors_named(path):
        if state is not None:
            kept = kept_metrics(path, state, first_step)
        make_way_for_file(path, "the run's metrics", say)
    return MetricsFile(path, kept, 0 if state is None else state["step"])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
