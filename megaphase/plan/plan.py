"""The plan of a run: opened from its run directory, built first where it is not there yet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.plan import _builder
from megaphase.plan.index import (
    INDEX_FILE,
    PhaseIndex,
    Progress,
    block_size,
    build_index,
    damage,
    slot_dtype,
    task_dtype,
)
from megaphase.plan.spec import PlanSpec
from megaphase.plan.stream import SampleLocation

REPEATED_TOO_OFTEN = 4.0  # epochs; repeating a corpus more has little value (Muennighoff et al. 2023)


@dataclass(frozen=True)
class PlannedSample:
    """One row of a batch: its task's number, and its ordinal in the task's stream."""

    task: int
    ordinal: int


def _map(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class Plan:
    """Random access to every sample of every phase, from memory-mapped files."""

    def __init__(self, spec: PlanSpec, folder: Path) -> None:
        self.spec = spec
        header = json.loads((folder / INDEX_FILE).read_text())
        self.tasks: list[str] = header["tasks"]
        self.phases = [PhaseIndex(**phase) for phase in header["phases"]]
        number = len(self.tasks)
        self._block = block_size(number)
        self._streams = list(spec.streams.values())
        self._blends = [
            (
                _map(folder / f"blend-{p}.tasks", task_dtype(number)),
                _map(folder / f"blend-{p}.counts", np.int64).reshape(-1, number),
            )
            for p in range(len(self.phases))
        ]
        self._locations = [
            (
                _map(folder / f"samples-{t}.slots", slot_dtype(stream)),
                _map(folder / f"samples-{t}.offsets", np.uint32),
            )
            for t, stream in enumerate(self._streams)
        ]

    def samples(self, phase: int, first: int, count: int) -> list[PlannedSample]:
        """The samples [first, first + count) of a phase, in order."""
        tasks, counts = self._blends[phase]
        ordinals = np.empty(count, np.int64)
        _builder.phase_ordinals(tasks, counts, self._block, first, ordinals)
        starts = self.phases[phase].starts
        return [
            PlannedSample(int(task), starts[task] + int(ordinal))
            for task, ordinal in zip(tasks[first : first + count], ordinals, strict=True)
        ]

    def locate(self, sample: PlannedSample) -> SampleLocation:
        """Where a sample begins in its corpus."""
        stream = self._streams[sample.task]
        slots, offsets = self._locations[sample.task]
        epoch, position = stream.position(sample.ordinal)
        entry = epoch * stream.samples_per_epoch + position
        return SampleLocation(epoch, int(slots[entry]), int(offsets[entry]))

    def read(self, sample: PlannedSample, out: np.ndarray) -> int:
        """Copy a sample's tokens into `out` (int64 [seq_len + 1]); returns how many there were."""
        return self._streams[sample.task].read(self.locate(sample), out)

    def summary(self) -> dict[str, Any]:
        """Tokens, rates and epochs per phase and task, as `plan.json` in the run directory."""
        spec = self.spec
        phases, first_step = [], 0
        for phase in self.phases:
            phases.append(
                {
                    "name": phase.name,
                    "steps": phase.steps,
                    "first_step": first_step,
                    "samples": phase.samples,
                    "tokens": phase.samples * spec.seq_len,
                    "tasks": dict(self._phase_tasks(phase)),
                }
            )
            first_step += phase.steps
        return {
            "seq_len": spec.seq_len,
            "samples_per_step": spec.samples_per_step,
            "tasks": {
                task: {
                    "documents": stream.documents,
                    "tokens": stream.tokens,
                    "held_out_documents": spec.held_out[task].documents,
                    "text_bytes": stream.corpus.manifest.text_bytes,
                }
                for task, stream in spec.streams.items()
            },
            "phases": phases,
        }

    def _phase_tasks(self, phase: PhaseIndex) -> Iterator[tuple[str, dict[str, float]]]:
        for i, (task, stream) in enumerate(self.spec.streams.items()):
            yield task, {
                "requested_rate": phase.requested_rates[i],
                "rate": phase.rates[i],
                "samples": phase.counts[i],
                "tokens": phase.counts[i] * self.spec.seq_len,
                "epochs": stream.epochs(phase.counts[i]),
                "epochs_so_far": stream.epochs(phase.starts[i] + phase.counts[i]),
            }


def plan_folder(run_dir: Path, spec: PlanSpec) -> Path:
    """Where the index of this spec lies in a run directory."""
    return run_dir / "plan" / spec.fingerprint[:16]


def ensure_built(
    spec: PlanSpec, run_dir: Path, *, say: Any = print, progress: Progress = lambda *_: None
) -> Path:
    """Build the index unless a whole one is there; a damaged one is named and built again."""
    folder = plan_folder(run_dir, spec)
    if folder.exists():
        problem = damage(folder, spec)
        if problem is None:
            return folder
        say(f"{folder}: {problem}; building the plan again")
        shutil.rmtree(folder)
    build_index(spec, folder, progress)
    return folder
