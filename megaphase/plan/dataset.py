"""From the plan to tensors: the rows of a step that one data-parallel rank trains on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megaphase.plan.plan import Plan
from megaphase.plan.stream import SampleLocation, Stream

IGNORED_TARGET = -100


@dataclass(frozen=True)
class Batch:
    """Samples ready for the model.

    inputs:  int64 [samples, seq_len]
    targets: int64 [samples, seq_len]; IGNORED_TARGET where an epoch's last sample ends early
    tasks:   int64 [samples], the task's number
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    tasks: torch.Tensor

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def split(self, samples: int) -> Iterator[Batch]:
        """The batch in pieces of `samples` samples."""
        pieces = (tensor.split(samples) for tensor in (self.inputs, self.targets, self.tasks))
        for inputs, targets, tasks in zip(*pieces, strict=True):
            yield Batch(inputs, targets, tasks)


class _Rows:
    """Collects samples of seq_len + 1 tokens into the arrays of a Batch."""

    def __init__(self, samples: int, seq_len: int, filler: int) -> None:
        self._tokens = np.full((samples, seq_len + 1), filler, np.int64)
        self._lengths = np.zeros(samples, np.int64)
        self._tasks = np.zeros(samples, np.int64)

    def row(self, i: int) -> np.ndarray:
        return self._tokens[i]

    def set(self, i: int, task: int, length: int) -> None:
        self._tasks[i], self._lengths[i] = task, length

    def batch(self) -> Batch:
        targets = self._tokens[:, 1:].copy()
        beyond = np.arange(1, self._tokens.shape[1])[None, :] >= self._lengths[:, None]
        targets[beyond] = IGNORED_TARGET
        return Batch(
            torch.from_numpy(self._tokens[:, :-1].copy()),
            torch.from_numpy(targets),
            torch.from_numpy(self._tasks),
        )


def read_step(plan: Plan, phase: int, step: int, rank: int, ranks: int, filler: int) -> Batch:
    """The rows of one optimizer step (0-based in its phase) for one of `ranks` data-parallel ranks.

    The global batch of a step is the same whatever `ranks` is; a rank takes a contiguous part.
    """
    samples = plan.spec.samples_per_step
    share = samples // ranks
    planned = plan.samples(phase, step * samples + rank * share, share)
    rows = _Rows(share, plan.spec.seq_len, filler)
    for i, sample in enumerate(planned):
        rows.set(i, sample.task, plan.read(sample, rows.row(i)))
    return rows.batch()


def read_held_out(stream: Stream, task: int, samples: int, filler: int) -> Batch:
    """The first `samples` samples (fewer where there are not so many) of a held-out stream."""
    samples = min(samples, stream.samples_per_epoch)
    slots, offsets = np.empty(samples, np.uint64), np.empty(samples, np.uint32)
    stream.fill_epoch(0, slots, offsets)
    rows = _Rows(samples, stream.seq_len, filler)
    for i in range(samples):
        location = SampleLocation(0, int(slots[i]), int(offsets[i]))
        rows.set(i, task, stream.read(location, rows.row(i)))
    return rows.batch()


class StepReader:
    """Iterates over a phase's steps, reading the next one in a thread while this one trains."""

    def __init__(self, plan: Plan, phase: int, *, rank: int, ranks: int, filler: int) -> None:
        self._plan, self._phase = plan, phase
        self._rank, self._ranks, self._filler = rank, ranks, filler

    def steps(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of the steps [first, last) of the phase."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-reader") as pool:
            ahead = pool.submit(self._read, first) if first < last else None
            for step in range(first, last):
                assert ahead is not None
                batch = ahead.result()
                ahead = pool.submit(self._read, step + 1) if step + 1 < last else None
                yield batch

    def _read(self, step: int) -> Batch:
        return read_step(self._plan, self._phase, step, self._rank, self._ranks, self._filler)
