"""Builds and stores the phased index: which sample of which task every training step sees.

A plan is a directory, written aside and renamed, whose name carries the fingerprint of all that
determines it. It holds, besides `index.json` (sizes, hashes, counts):

    blend-P.tasks     the task of every sample of phase P                      u16 or u32 [samples]
    blend-P.counts    turns of every task before each block of that blend      i64 [blocks, tasks]
    samples-T.slots   where the samples of task T begin, epoch after epoch,    u32 or u64 [index]
    samples-T.offsets in token order: document slot and offset in the document u32 [index]
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.files import (
    describe_file,
    directory_written_aside,
    file_damage,
    hash_json,
    write_json_whole,
)
from megaphase.plan import _builder
from megaphase.plan.mixture import TaskSupply, effective_rates, integer_weights, requested_rates
from megaphase.plan.spec import PhaseSpec, PlanSpec
from megaphase.plan.stream import Stream

INDEX_FILE = "index.json"
SAMPLES_PER_CALL = 1 << 22

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PhaseIndex:
    """One phase of a stored plan; lists run over the tasks in the run file's order.

    `starts` are the ordinals at which the tasks' streams go on, `counts` how many samples of each
    task the phase takes.
    """

    name: str
    steps: int
    samples: int
    requested_rates: list[float]
    rates: list[float]
    starts: list[int]
    counts: list[int]


def task_dtype(tasks: int) -> type[np.generic]:
    """The smallest unsigned integer that can number the tasks."""
    return np.uint16 if tasks <= 1 << 16 else np.uint32


def slot_dtype(stream: Stream) -> type[np.generic]:
    """The smallest unsigned integer that can number a corpus's documents."""
    return np.uint32 if len(stream.corpus.lengths) <= 1 << 32 else np.uint64


def block_size(tasks: int) -> int:
    """Samples between two rows of turn counts: at most half a byte a sample is spent on them."""
    block = 1024
    while block < 16 * tasks:
        block *= 2
    return block


def _create(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    array_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    with open(path, "wb") as file:
        if array_bytes == 0:
            return np.empty(shape, dtype)
        # A full disk is an error here; in a sparse file it would kill the process later on.
        os.posix_fallocate(file.fileno(), 0, array_bytes)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)


def _build_blend(
    folder: Path, number: int, phase: PhaseSpec, spec: PlanSpec, used: list[int], progress: Progress
) -> PhaseIndex:
    names = list(spec.streams)
    samples = phase.steps * spec.samples_per_step
    supply = {
        task: TaskSupply(stream.tokens, stream.samples_per_epoch, used[i])
        for i, (task, stream) in enumerate(spec.streams.items())
    }
    rates = effective_rates(phase.mixture, supply, samples, phase.where)
    requested = requested_rates(phase.mixture, supply)
    blend = _builder.EarliestDeadlineFirst(
        integer_weights([rates[task] for task in names], samples, _builder.LARGEST_TOTAL_WEIGHT)
    )
    block = block_size(len(names))
    tasks = _create(folder / f"blend-{number}.tasks", task_dtype(len(names)), (samples,))
    counts = _create(
        folder / f"blend-{number}.counts", np.int64, (-(-samples // block), len(names))
    )
    stride = max(SAMPLES_PER_CALL // block, 1) * block
    for first in range(0, samples, stride):
        last = min(first + stride, samples)
        rows = slice(first // block, -(-last // block))
        _builder.fill_blend(blend, tasks[first:last], counts[rows], block)
        progress(f"blend of {phase.name}", last, samples)
    return PhaseIndex(
        phase.name,
        phase.steps,
        samples,
        [float(requested[task]) for task in names],
        [float(rates[task]) for task in names],
        list(used),
        list(blend.counts),
    )


def _build_samples(
    folder: Path, number: int, stream: Stream, ordinals: int, progress: Progress
) -> None:
    epochs = -(-ordinals // stream.samples_per_epoch)
    sizes = [stream.index_size(epoch, ordinals) for epoch in range(epochs)]
    slots = _create(folder / f"samples-{number}.slots", slot_dtype(stream), (sum(sizes),))
    offsets = _create(folder / f"samples-{number}.offsets", np.uint32, (sum(sizes),))
    for epoch, size in enumerate(sizes):
        first = epoch * stream.samples_per_epoch
        stream.fill_epoch(epoch, slots[first : first + size], offsets[first : first + size])
        progress(f"samples of {stream.task}", epoch + 1, epochs)


def build_index(spec: PlanSpec, folder: Path, progress: Progress) -> None:
    """Build the whole index and make it appear as `folder`.

    progress(what, done, of) is called now and then.
    """
    with directory_written_aside(folder) as aside:
        used = [0] * len(spec.streams)
        phases = []
        for number, phase in enumerate(spec.phases):
            phases.append(_build_blend(aside, number, phase, spec, used, progress))
            used = [a + b for a, b in zip(used, phases[-1].counts, strict=True)]
        for number, stream in enumerate(spec.streams.values()):
            _build_samples(aside, number, stream, used[number], progress)
        files = {path.name: describe_file(path) for path in sorted(aside.iterdir())}
        header = {
            "fingerprint": spec.fingerprint,
            "tasks": list(spec.streams),
            "phases": [asdict(phase) for phase in phases],
            "files": files,
        }
        write_json_whole(aside / INDEX_FILE, header | {"hash": hash_json(header)})


def damage(folder: Path, spec: PlanSpec) -> str | None:
    """Why the stored index cannot be used, or None when every byte of it is as it was written."""
    try:
        header = json.loads((folder / INDEX_FILE).read_text())
        if header.pop("hash") != hash_json(header):
            return f"{INDEX_FILE} has been altered"
        if header["fingerprint"] != spec.fingerprint:
            return f"{INDEX_FILE} belongs to another plan"
        for name, facts in header["files"].items():
            if fault := file_damage(folder / name, facts):
                return f"{name} {fault}"
    except FileNotFoundError:
        return f"{INDEX_FILE} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{INDEX_FILE} is damaged"
    return None
