"""Writes down what a step saw, for a person who looks for what went wrong in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megaphase.files import os_errors_named, write_text_whole
from megaphase.plan.plan import Plan
from megaphase.plan.trace import as_json, trace_step
from megaphase.set_aside import make_way_for_directory, make_way_for_file
from megaphase.training.position import Position


class StepTrace:
    """Writes `traces/step-XXXXXXXX.jsonl` in the run directory: on rank 0, a sample a line."""

    def __init__(self, folder: Path, plan: Plan, *, writes: bool) -> None:
        self._folder, self._plan, self._writes = folder, plan, writes

    def write(self, at: Position) -> str:
        """Write down the step that led to a position; the file's path."""
        path = self._folder / f"step-{at.step:08d}.jsonl"
        if self._writes:
            starts = np.array(at.starts, np.int64)
            samples = trace_step(self._plan, at.phase, at.phase_step, starts)
            lines = [json.dumps(as_json(sample, None)) + "\n" for sample in samples]
            with os_errors_named(path):
                make_way_for_directory(self._folder, "the directory of traces")
                self._folder.mkdir(exist_ok=True)
                make_way_for_file(path, "a trace")
                write_text_whole(path, "".join(lines))
        return str(path)
