"""Writes down what a step saw, for a person who looks for what went wrong in it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from megaphase.plan.plan import Plan
from megaphase.plan.trace import TracedSample, as_json, sample_origins, trace_step
from megaphase.training.train_state import TrainState
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_text, os_errors_named
from megaphase.utils.set_aside import make_way_for_directory, make_way_for_file


class BatchDump:
    """Writes `traces/step-XXXXXXXX.jsonl` in the run directory: on rank 0, a sample a line."""

    def __init__(self, folder: Path, plan: Plan, *, writes: bool) -> None:
        self._folder, self._plan, self._writes = folder, plan, writes

    def write(self, at: TrainState) -> str:
        """Write down the step that led to a position; the file's path."""
        path = self._folder / f"step-{at.step:08d}.jsonl"
        if self._writes:
            starts = np.array(at.starts, np.int64)
            samples = trace_step(self._plan, at.phase, at.phase_step, starts)
            lines = [self._line(sample) for sample in samples]
            with os_errors_named(path):
                make_way_for_directory(self._folder, "the directory of traces")
                self._folder.mkdir(exist_ok=True)
                make_way_for_file(path, "a trace")
                atomic_write_text(path, "".join(lines))
        return str(path)

    def _line(self, sample: TracedSample) -> str:
        origins = None
        with suppress(InputError):  # training does not depend on where documents come from
            origins = sample_origins(self._plan, sample)
        return json.dumps(as_json(sample, None, origins), ensure_ascii=False) + "\n"
