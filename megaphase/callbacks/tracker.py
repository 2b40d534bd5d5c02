"""Trackers: callbacks on rank 0 that record what metrics.jsonl records, somewhere else as well."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from megaphase.callbacks.callback import Callback, StepRecord, ValidationRecord
from megaphase.config.fields import Section
from megaphase.utils.metrics_rows import Row


class Tracker(Callback, ABC):
    """Records a run's rows; exists on rank 0 alone.

    A row is a dictionary of JSON values, but for numbers that are not finite: a training step
    ("loss_by_task" is in it), a validation ("validation" is in it) or an event ("event" is in it).
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

    def on_event(self, step: int, event: str, facts: Mapping[str, Any]) -> None:
        self.write({"step": step, "event": event, **facts})


class TrackerConfig(Section):
    """The section of a tracker in `logging`; a run whose run file has none is not tracked by it."""

    def build(self, settings: Mapping[str, Any], resumed_step: int | None) -> Tracker:
        """Open the tracker, on rank 0.

        Args:
            settings: of the run, as in its run.json.
            resumed_step: of the checkpoint from which the run resumes, after which everything is
                recorded again; None where the run starts.
        """
        raise NotImplementedError
