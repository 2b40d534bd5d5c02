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

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.plan.built_folder import open_files, read_header, stored_damage
from megaphase.plan.spec import FORMAT_VERSION, PlanSpec
from megaphase.plan.verified_file import VerifiedArray
from megaphase.utils.cores import available_cores

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
    return min(available_cores(), 8)


def damage(folder: Path, spec: PlanSpec, *, whole: bool = False) -> str | None:
    """Return why the stored index cannot be used, or None; `whole`: see stored_damage."""
    threads = builder_threads()
    return stored_damage(folder, FORMAT_VERSION, spec.fingerprint, "plan", threads, whole=whole)


class StoredIndex:
    """The arrays of a stored index, memory-mapped; what is read of them is verified first.

    Attributes:
        phases: the counts of every phase.
        blends: for every phase, the task of every sample [samples] and the turns of every task
            before each block [blocks, tasks].
        starts: for every task, the slot and offset where its samples begin [samples, 2].
        files: all its files.
        header: the content of `index.json`.
    """

    def __init__(self, folder: Path, spec: PlanSpec, header: dict[str, Any] | None = None) -> None:
        """
        Args:
            header: the content of its `index.json`, if it has been read already.
        """
        header = read_header(folder) if header is None else header
        self.header = header
        tasks = len(spec.streams)
        files = open_files(folder, header)
        self.files = list(files.values())
        self.phases = [PhaseIndex(**phase) for phase in header["phases"]]
        self.blends = [
            (
                VerifiedArray.of(files[f"blend-{number}.tasks"], task_dtype(tasks)),
                VerifiedArray.of(files[f"blend-{number}.counts"], np.int64, tasks),
            )
            for number in range(len(self.phases))
        ]
        self.starts = [
            VerifiedArray.of(files[STARTS_FILE], stream.start_dtype, 2, first, samples)
            for stream, (first, samples) in zip(
                spec.streams.values(), header["starts"], strict=True
            )
        ]
