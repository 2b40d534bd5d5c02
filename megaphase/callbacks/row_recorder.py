"""Callbacks on rank 0 that write a run's rows as they come: metrics.jsonl and TensorBoard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from megaphase.callbacks.callback import BenchmarkRecord, Callback, StepRecord, ValidationRecord
from megaphase.utils.metrics_rows import Row


class RowRecorder(Callback, ABC):
    """Writes a run's rows to a file beside the run; exists on rank 0 alone.

    A row is a dictionary of JSON values, but for numbers that are not finite: a training step
    ("loss_by_task" is in it), a validation ("validation" is in it), a measurement of benchmarks
    ("benchmarks" is in it) or an event ("event" is in it).
    `on_save` and `on_run_end` are there to flush and to close.
    """

    @abstractmethod
    def write(self, row: Row) -> None:
        """Record one row.

        Raises:
            RunError: it cannot be written.
        """

    def on_step_end(self, record: StepRecord) -> None:
        self.write(record.row())

    def on_validation_end(self, record: ValidationRecord) -> None:
        self.write(record.row())

    def on_benchmarks_end(self, record: BenchmarkRecord) -> None:
        self.write(record.row())

    def on_event(self, step: int, event: str, facts: Mapping[str, Any]) -> None:
        self.write({"step": step, "event": event, **facts})
