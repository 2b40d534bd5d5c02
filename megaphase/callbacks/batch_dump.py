"""Writes the samples of a step to a file if it was skipped or had a loss spike."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaphase.callbacks.callback import Callback, StepRecord
from megaphase.plan.plan import Plan
from megaphase.plan.trace import TracedSample, sample_as_json, sample_origins, trace_step
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_text, os_errors_named
from megaphase.utils.set_aside import make_way_for_directory, make_way_for_file

EVENTS = ("step_skipped", "loss_spike", "spike_skipped")


class BatchDump(Callback):
    """Writes a file, a sample a line, for each step that is skipped or has a loss spike.

    Exists on rank 0 alone, before the callbacks that record these events.
    """

    def __init__(self, plan: Plan, path: Callable[[int], Path]) -> None:
        """path: the file of a step."""
        self._plan, self._path = plan, path
        self._newest: StepRecord | None = None

    def on_step_end(self, record: StepRecord) -> None:
        self._newest = record

    def on_event(self, step: int, event: str, facts: Mapping[str, Any]) -> None:
        if event in EVENTS and self._newest is not None:
            self._write(self._newest)

    def _write(self, step: StepRecord) -> None:
        path = self._path(step.step)
        samples = trace_step(self._plan, step.phase_number, step.phase_step, step.starts)
        lines = [self._line(sample) for sample in samples]
        with os_errors_named(path):
            make_way_for_directory(path.parent, "the directory of traces")
            path.parent.mkdir(exist_ok=True)
            make_way_for_file(path, "a trace")
            atomic_write_text(path, "".join(lines))

    def _line(self, sample: TracedSample) -> str:
        origins = None
        with suppress(InputError):  # training does not depend on where documents come from
            origins = sample_origins(self._plan, sample)
        return json.dumps(sample_as_json(sample, None, origins), ensure_ascii=False) + "\n"
