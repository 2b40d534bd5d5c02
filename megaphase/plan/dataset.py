"""Read the batches of a plan's steps for one data-parallel rank."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from megaphase.model.document_mask import DocumentBounds
from megaphase.plan.plan import Plan, Starts
from megaphase.plan.stream import Stream
from megaphase.utils.targets import IGNORED_TARGET

# Number of later steps that are read, each by a thread, while one trains.
STEPS_AHEAD = 4


@dataclass(frozen=True)
class Batch:
    """Samples ready for the model.

    inputs:    int64 [samples, seq_len]
    targets:   int64 [samples, seq_len]; IGNORED_TARGET at positions without a loss
    tasks:     int64 [samples], the index of each sample's task
    documents: int64 [samples, seq_len], the index of every input's document within its row, 0 in a
               row whose documents attend to each other; None if that holds for all rows
    bounds:    of the documents; None if nothing needs them, or they are still to be computed
    scored:    int64 [samples], the number of targets of each row; None if still to be counted
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    tasks: torch.Tensor
    documents: torch.Tensor | None = None
    bounds: DocumentBounds | None = None
    scored: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @property
    def scored_tokens(self) -> torch.Tensor:
        """The number of targets of each row; int64 [samples]."""
        if self.scored is not None:
            return self.scored
        return (self.targets != IGNORED_TARGET).sum(1)

    def pinned(self) -> Batch:
        """Return a copy in pinned memory, from which a GPU copies asynchronously, and with all that
        training needs to know of it on the CPU."""
        documents, bounds = self.documents, None
        if documents is not None:
            bounds = (self.bounds or DocumentBounds.of(documents)).apply(torch.Tensor.pin_memory)
            documents = documents.pin_memory()
        return Batch(
            self.inputs.pin_memory(),
            self.targets.pin_memory(),
            self.tasks,
            documents,
            bounds,
            self.scored_tokens,
        )

    def split(self, samples: int) -> Iterator[Batch]:
        """Yield the batch in parts of `samples` samples."""
        for first in range(0, len(self), samples):
            yield self[first : first + samples]

    def __getitem__(self, rows: slice) -> Batch:
        """Return some of the samples."""
        documents = _where_needed(None if self.documents is None else self.documents[rows])
        bounds = None if documents is None or self.bounds is None else self.bounds[rows]
        return Batch(
            self.inputs[rows],
            self.targets[rows],
            self.tasks[rows],
            documents,
            bounds,
            None if self.scored is None else self.scored[rows],
        )


def _where_needed(documents: torch.Tensor | None) -> torch.Tensor | None:
    """Return None if every row is one document or is treated as one."""
    return documents if documents is not None and documents.any() else None


def _empty_rows(samples: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return uninitialized inputs and targets, and documents that are all 0."""
    shape = samples, seq_len
    return np.empty(shape, np.int64), np.empty(shape, np.int64), np.zeros(shape, np.int64)


def _batch(
    inputs: np.ndarray, targets: np.ndarray, tasks: np.ndarray, documents: np.ndarray
) -> Batch:
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        torch.from_numpy(tasks),
        _where_needed(torch.from_numpy(documents)),
    )


def read_step(
    plan: Plan,
    phase: int,
    step: int,
    rank: int,
    ranks: int,
    pad_token_id: int,
    starts: Starts | None = None,
) -> Batch:
    """The rows of one optimizer step (0-based in its phase) for one of `ranks` data-parallel ranks.

    The global batch of a step does not depend on `ranks`; a rank gets a contiguous part of it.
    `pad_token_id` is the input after the end of a sample; for `starts` see Plan.samples.
    """
    batch = plan.spec.phases[phase].batch
    samples = batch.samples_at(step)
    if samples % ranks:
        raise ValueError(f"{ranks} ranks do not divide a step's {samples} samples")
    share = samples // ranks
    planned = plan.samples(phase, batch.samples_before(step) + rank * share, share, starts)
    inputs, targets, documents = _empty_rows(share, plan.spec.phases[phase].kind.seq_len)
    plan.read(planned, inputs, targets, pad_token_id, documents)
    return _batch(inputs, targets, planned.tasks, documents)


def read_samples(
    stream: Stream, task: int, starts: np.ndarray, pad_token_id: int, rows: int
) -> Batch:
    """Return the samples of a stream's epoch 0 that begin there, such as held-out ones, with rows
    without targets after them up to `rows` in all.

    starts: start_dtype [samples, 2], of samples that follow each other.
    """
    count = len(starts)
    inputs, targets, documents = _empty_rows(rows, stream.seq_len)
    numbers = np.arange(count)
    stream.read(starts, numbers, numbers, inputs, targets, pad_token_id, documents)
    inputs[count:], targets[count:] = pad_token_id, IGNORED_TARGET
    return _batch(inputs, targets, np.full(rows, task), documents)


class StepReader:
    """Iterates over a phase's steps; threads read the next ones while this one trains.

    The threads read different steps at the same time, so that a disk or a network file system can
    process several requests; the steps are yielded in order.

    Attributes:
        wait_seconds: how long the last yielded step was waited for.
    """

    def __init__(
        self,
        plan: Plan,
        phase: int,
        *,
        rank: int,
        ranks: int,
        pad_token_id: int,
        starts: Starts | None = None,
    ) -> None:
        """See read_step; starts: if an earlier phase has ended early."""
        self.wait_seconds = 0.0
        self._plan, self._phase = plan, phase
        self._rank, self._ranks, self._pad_token_id, self._starts = (
            rank,
            ranks,
            pad_token_id,
            plan.open_phase(phase, starts),
        )

    def steps(self, first: int, last: int) -> Iterator[Batch]:
        """Yield the batches of the steps [first, last) of the phase."""
        with ThreadPoolExecutor(STEPS_AHEAD, thread_name_prefix="step-reader") as pool:
            steps = iter(range(first, last))
            ahead = deque(pool.submit(self._read, step) for step in islice(steps, STEPS_AHEAD))
            while ahead:
                began = time.perf_counter()
                batch = ahead.popleft().result()
                self.wait_seconds = time.perf_counter() - began
                ahead.extend(pool.submit(self._read, step) for step in islice(steps, 1))
                yield batch

    def _read(self, step: int) -> Batch:
        batch = read_step(
            self._plan, self._phase, step, self._rank, self._ranks, self._pad_token_id, self._starts
        )
        return batch.pinned() if torch.cuda.is_available() else batch
