"""The plan of a run: opened from its run directory, built first where it is not there yet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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
from megaphase.plan.stream import SampleLocations

# Epochs; repeating a corpus more often has little value (Muennighoff et al. 2023).
REPEATED_TOO_OFTEN = 4.0


@dataclass(frozen=True)
class PlannedSamples:
    """Rows of a batch.

    tasks:    int64 [samples], the task's number
    ordinals: int64 [samples], in the task's stream
    """

    tasks: np.ndarray
    ordinals: np.ndarray


def _map(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


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

    def samples(self, phase: int, first: int, count: int) -> PlannedSamples:
        """The samples [first, first + count) of a phase, in order."""
        blend, counts = self._blends[phase]
        ordinals = np.empty(count, np.int64)
        _builder.phase_ordinals(blend, counts, self._block, first, ordinals)
        tasks = blend[first : first + count].astype(np.int64)
        return PlannedSamples(tasks, ordinals + np.array(self.phases[phase].starts)[tasks])

    def locate(self, task: int, ordinals: np.ndarray) -> SampleLocations:
        """Where samples of one task begin in its corpus."""
        stream = self._streams[task]
        slots, offsets = self._locations[task]
        numbers = stream.in_token_order(ordinals)
        return SampleLocations(
            numbers // stream.samples_per_epoch, slots[numbers].astype(np.int64), offsets[numbers]
        )

    def read(
        self, samples: PlannedSamples, inputs: np.ndarray, targets: np.ndarray, filler: int
    ) -> None:
        """Read samples into inputs and targets, int64 [samples, seq_len]; see Stream.read."""
        for task in np.unique(samples.tasks):
            rows = np.flatnonzero(samples.tasks == task)
            locations = self.locate(task, samples.ordinals[rows])
            self._streams[task].read(locations, rows, inputs, targets, filler)

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
                    "tasks": {
                        task: self._task_figures(phase, i) for i, task in enumerate(self.tasks)
                    },
                }
            )
            first_step += phase.steps
        return {
            "fingerprint": spec.fingerprint,
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

    def _task_figures(self, phase: PhaseIndex, task: int) -> dict[str, float]:
        stream, samples = self._streams[task], phase.counts[task]
        return {
            "requested_rate": phase.requested_rates[task],
            "rate": phase.rates[task],
            "samples": samples,
            "tokens": samples * self.spec.seq_len,
            "epochs": stream.epochs(samples),
            "epochs_so_far": stream.epochs(phase.starts[task] + samples),
        }


def plan_folder(run_dir: Path, spec: PlanSpec) -> Path:
    """Where the index of this spec lies in a run directory."""
    return run_dir / "plan" / spec.fingerprint[:16]


def ensure_built(
    spec: PlanSpec,
    run_dir: Path,
    *,
    say: Callable[[str], object] = print,
    progress: Progress = lambda *_: None,
) -> Path:
    """Build the index unless a whole one is there; a damaged one is named and built again.

    Returns the index's folder. `say` gets the sentence that names the damage.
    """
    folder = plan_folder(run_dir, spec)
    if folder.exists():
        problem = damage(folder, spec)
        if problem is None:
            return folder
        say(f"{folder}: {problem}; building the plan again")
        shutil.rmtree(folder)
    try:
        build_index(spec, folder, progress)
    except OSError:
        if not folder.exists():
            raise
        # Another process has built the same index meanwhile; it appears whole or not at all.
    return folder
