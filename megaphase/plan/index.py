"""The stored index of a plan: the task and the position of every sample of every training step.

An index is a directory, published by renaming, whose name contains the fingerprint of everything
that determines it. It contains `index.json` (counts, and the hashes of all pieces of the others)
and

    blend-P.tasks   the task of every sample of phase P                   u16 or u32 [samples]
    blend-P.counts  turns of every task before each block of that blend   i64 [blocks, tasks]
    starts          for every task, from a multiple of START_ALIGNMENT    u32 or u64 [samples, 2]
                    bytes on: where its samples begin, epoch after epoch
                    (for translation pairs one epoch), in token order:
                    document slot and offset in the document
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.plan.built_folder import read_header, stored_damage
from megaphase.plan.spec import FORMAT_VERSION, PlanSpec

STARTS_FILE = "starts"
START_ALIGNMENT = 16


@dataclass(frozen=True)
class PhaseIndex:
    """One phase of a stored plan; lists are over the tasks in the run file's order.

    `starts` are the ordinals at which the tasks' streams continue, `counts` the numbers of samples
    of each task in the phase. `requested_from_to` and `rates_from_to` are the rates at the phase's
    start and at its end, [2][tasks], where they change within the phase; `requested_rates` and
    `rates` are then their means.
    """

    name: str
    steps: int
    samples: int
    requested_rates: list[float]
    rates: list[float]
    starts: list[int]
    counts: list[int]
    requested_from_to: list[list[float]] | None = None
    rates_from_to: list[list[float]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the phase for the index's header."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def task_dtype(tasks: int) -> type[np.generic]:
    """Return the smallest unsigned integer type that can number the tasks."""
    return np.uint16 if tasks <= 1 << 16 else np.uint32


def block_size(tasks: int) -> int:
    """Return the samples between two rows of turn counts, which cost at most half a byte each."""
    block = 1024
    while block < 16 * tasks:
        block *= 2
    return block


def builder_threads() -> int:
    """Return the threads for building and verifying: one per core; over 8 would wait for the
    disk."""
    return min(len(os.sched_getaffinity(0)), 8)


def damage(folder: Path, spec: PlanSpec) -> str | None:
    """Return why the stored index cannot be used, or None if no byte of it was altered."""
    return stored_damage(folder, FORMAT_VERSION, spec.fingerprint, "plan", builder_threads())


class StoredIndex:
    """The arrays of a stored index, memory-mapped.

    Attributes:
            phases: the counts of every phase.
        blends: for every phase, the task of every sample [samples] and the turns of every task
            before each block [blocks, tasks].
        starts: for every task, the slot and offset where its samples begin [samples, 2].
    """

    def __init__(self, folder: Path, spec: PlanSpec) -> None:
        header = read_header(folder)
        tasks = len(spec.streams)
        self.phases = [PhaseIndex(**phase) for phase in header["phases"]]
        self.blends = [
            (
                _map(folder / f"blend-{number}.tasks").view(task_dtype(tasks)),
                _map(folder / f"blend-{number}.counts").view(np.int64).reshape(-1, tasks),
            )
            for number in range(len(self.phases))
        ]
        starts = _map(folder / STARTS_FILE)
        self.starts = [
            starts[first : first + 2 * samples * np.dtype(stream.start_dtype).itemsize]
            .view(stream.start_dtype)
            .reshape(samples, 2)
            for stream, (first, samples) in zip(
                spec.streams.values(), header["starts"], strict=True
            )
        ]


def _map(path: Path) -> np.ndarray:
    # A plain view: numpy's memmap class costs microseconds at every use.
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
