"""The plan of a run: every sample of every phase, and its summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.plan import _builder
from megaphase.plan.index import PhaseIndex, StoredIndex, block_size
from megaphase.plan.spec import PlanSpec

# In epochs; repeating a corpus more often has little value (Muennighoff et al. 2023).
REPEATED_TOO_OFTEN = 4.0


@dataclass(frozen=True)
class PlannedSamples:
    """The samples of a batch's rows.

    tasks:    int64 [samples], the index of each sample's task
    ordinals: int64 [samples], the sample's number in the task's stream
    """

    tasks: np.ndarray
    ordinals: np.ndarray

    def by_task(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield every task in the batch, in order, with the rows of its samples."""
        in_groups = np.argsort(self.tasks, kind="stable")
        tasks, firsts = np.unique(self.tasks[in_groups], return_index=True)
        yield from zip(tasks.tolist(), np.split(in_groups, firsts[1:]), strict=True)


@dataclass(frozen=True)
class SampleLocations:
    """Where samples of one task begin.

    epochs:    int64 [samples]
    positions: int64 [samples], of the sample in its epoch's token order
    slots:     int64 [samples], of its first document in the epoch's order of documents
    offsets:   int64 [samples], token offset in that document
    """

    epochs: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    offsets: np.ndarray


class Plan:
    """Random access to every sample of every phase, from memory-mapped files."""

    def __init__(self, spec: PlanSpec, folder: Path) -> None:
        self.spec = spec
        self.folder = folder
        self.tasks = list(spec.streams)
        self._index = StoredIndex(folder, spec)
        self.phases = self._index.phases
        self._block = block_size(len(self.tasks))
        self._streams = list(spec.streams.values())
        self._used = np.array([spec.used[task] for task in self.tasks], np.int64)
        self._first_ordinals = [np.array(phase.starts, np.int64) for phase in self.phases]

    def counts(self, phase: int, steps: int) -> np.ndarray:
        """Return the samples of every task in the first `steps` steps of a phase, int64 [tasks]."""
        samples = self.spec.phases[phase].batch.samples_before(steps)
        order, counts = self._index.blends[phase]
        if not 0 <= samples <= len(order):
            raise ValueError(f"{self.phases[phase].name} has no {steps} steps")
        block = min(samples // self._block, len(counts) - 1)
        since = order[block * self._block : samples]
        found: np.ndarray = counts[block] + np.bincount(since, minlength=len(self.tasks))
        return found

    def first_ordinals(self, phase_steps: Sequence[int]) -> np.ndarray:
        """Return the ordinals at which streams continue after phases of these lengths, int64
        [tasks]."""
        return self._used + sum(self.counts(i, steps) for i, steps in enumerate(phase_steps))

    def samples(
        self, phase: int, first: int, count: int, starts: np.ndarray | None = None
    ) -> PlannedSamples:
        """Return the samples [first, first + count) of a phase, in order.

        starts: int64 [tasks], the ordinals at which the streams continue, if an earlier phase has
                ended early; by default those of the plan
        """
        planned = self._first_ordinals[phase]
        if starts is None:
            starts = planned
        elif ((starts < self._used) | (starts > planned)).any():
            raise ValueError(f"{self.phases[phase].name} cannot begin at ordinals {starts}")
        order, counts = self._index.blends[phase]
        ordinals = np.empty(count, np.int64)
        _builder.phase_ordinals(order, counts, self._block, first, ordinals)
        tasks = order[first : first + count].astype(np.int64)
        return PlannedSamples(tasks, ordinals + starts[tasks])

    def locate(self, task: int, ordinals: np.ndarray) -> SampleLocations:
        """Return where samples of one task begin in its corpus."""
        stream = self._streams[task]
        numbers = stream.in_token_order(ordinals)
        starts = self._index.starts[task][stream.index_rows(numbers)].astype(np.int64)
        return SampleLocations(
            *np.divmod(numbers, stream.samples_per_epoch), starts[:, 0], starts[:, 1]
        )

    def read(
        self,
        samples: PlannedSamples,
        inputs: np.ndarray,
        targets: np.ndarray,
        pad_token_id: int,
        documents: np.ndarray | None = None,
    ) -> None:
        """Read samples into inputs and targets, int64 [samples, seq_len]; see Stream.read.

        documents: int64 [samples, seq_len], needed if a task's documents do not attend to each
            other;
                   the rows of other tasks are not changed
        """
        for task, rows in samples.by_task():
            stream = self._streams[task]
            numbers = stream.in_token_order(samples.ordinals[rows])
            starts = self._index.starts[task]
            stream.read(starts, numbers, rows, inputs, targets, pad_token_id, documents)

    def summary(self) -> dict[str, Any]:
        """Return tokens, rates and epochs per phase and task, as in the run's `plan.json`."""
        spec = self.spec
        phases, first_step = [], 0
        for number, phase in enumerate(self.phases):
            phases.append(
                {
                    "name": phase.name,
                    "order": spec.phases[number].order,
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
            **self._samples_per_step(),
            **({} if spec.bos is None else {"bos": spec.bos}),
            "tasks": {
                task: {
                    "documents": stream.documents,
                    "tokens": stream.tokens,
                    "held_out_documents": spec.held_out[task].documents,
                    "text_bytes": stream.text_bytes(),
                }
                for task, stream in spec.streams.items()
            },
            "phases": phases,
        }

    def _samples_per_step(self) -> dict[str, int]:
        """The samples of a step, where all steps of the run have equally many."""
        batches = [phase.batch for phase in self.spec.phases]
        sizes = {stage.samples for batch in batches for stage in batch.stages}
        return {"samples_per_step": sizes.pop()} if len(sizes) == 1 else {}

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
