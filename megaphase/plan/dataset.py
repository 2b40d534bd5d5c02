"""From the plan to tensors: the rows of a step that one data-parallel rank trains on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megaphase.plan.plan import Plan
from megaphase.plan.stream import Stream


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


def _empty_batch(samples: int, seq_len: int) -> Batch:
    inputs, targets = (torch.empty((samples, seq_len), dtype=torch.int64) for _ in range(2))
    return Batch(inputs, targets, torch.empty(samples, dtype=torch.int64))


def read_step(plan: Plan, phase: int, step: int, rank: int, ranks: int, filler: int) -> Batch:
    """The rows of one optimizer step (0-based in its phase) for one of `ranks` data-parallel ranks.

    The global batch of a step is the same whatever `ranks` is; a rank takes a contiguous part.
    `filler` is the input where an epoch's last sample has ended.
    """
    samples = plan.spec.samples_per_step
    if samples % ranks:
        raise ValueError(f"{ranks} ranks do not divide a step's {samples} samples")
    share = samples // ranks
    planned = plan.samples(phase, step * samples + rank * share, share)
    batch = _empty_batch(share, plan.spec.seq_len)
    plan.read(planned, batch.inputs.numpy(), batch.targets.numpy(), filler)
    batch.tasks.copy_(torch.from_numpy(planned.tasks))
    return batch


def read_held_out(stream: Stream, task: int, samples: int, filler: int) -> Batch:
    """The first `samples` samples (fewer where there are not so many) of a held-out stream."""
    samples = min(samples, stream.samples_per_epoch)
    starts = stream.first_starts(samples)
    batch = _empty_batch(samples, stream.seq_len)
    numbers = np.arange(samples)
    stream.read(starts, numbers, numbers, batch.inputs.numpy(), batch.targets.numpy(), filler)
    batch.tasks.fill_(task)
    return batch


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
