"""The plan of a run: every sample of every phase, and its summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from megaphase.plan import _builder
from megaphase.plan.document_stream import DocumentStream
from megaphase.plan.index import PhaseIndex, StoredIndex, block_size, builder_threads
from megaphase.plan.position import SampleKind, StreamPosition
from megaphase.plan.spec import PlanSpec
from megaphase.plan.step_rates import StepRates
from megaphase.plan.stream_part import StreamPart
from megaphase.plan.task_stream import TaskStream
from megaphase.plan.verified_file import VerifiedArray, VerifiedFile
from megaphase.utils.files import os_errors_named

# In epochs; repeating a corpus more often has little value (Muennighoff et al. 2023).
REPEATED_TOO_OFTEN = 4.0


@dataclass(frozen=True)
class PlannedSamples:
    """The samples of a batch's rows.

    tasks:    int64 [samples], the index of each sample's task
    ordinals: int64 [samples], the sample's number in the task's stream
    start:    of their phase
    """

    tasks: np.ndarray
    ordinals: np.ndarray
    start: PhaseStart

    def by_task(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield every task in the batch, in order, with the rows of its samples."""
        in_groups = np.argsort(self.tasks, kind="stable")
        tasks, firsts = np.unique(self.tasks[in_groups], return_index=True)
        yield from zip(tasks.tolist(), np.split(in_groups, firsts[1:]), strict=True)


class PhaseStart:
    """The positions from which the tasks' streams continue in a phase.

    Attributes:
        positions: of every task.
        ordinals: int64 [tasks], of the first samples.
    """

    def __init__(
        self,
        streams: Sequence[TaskStream],
        positions: Sequence[StreamPosition],
        kind: SampleKind,
        starts: Sequence[VerifiedArray],
    ) -> None:
        """
        Args:
            kind: of the phase's samples.
            starts: of every task, see StoredIndex.
        """
        self.positions = list(positions)
        self.ordinals = np.array([each.samples for each in positions], np.int64)
        self._streams, self._kind, self._starts = streams, kind, starts
        self._parts: dict[int, StreamPart] = {}
        self._locks = [Lock() for _ in positions]

    def part(self, task: int) -> StreamPart:
        """Return the task's samples from its position on."""
        part = self._parts.get(task)
        if part is None:
            with self._locks[task]:
                part = self._parts.get(task)
                if part is None:
                    start, stream = self.positions[task], self._streams[task]
                    part = stream.part(start, self._kind, self._starts[task])
                    self._parts[task] = part
        return part

    def open(self, counts: Sequence[int]) -> None:
        """Open the next `counts` samples of every task; builds the tables of packed documents that
        they need.

        Raises as DocumentTables.table does.
        """
        with ThreadPoolExecutor(builder_threads(), thread_name_prefix="plan-builder") as pool:
            jobs = [pool.submit(self._open, *each) for each in enumerate(counts) if each[1] > 0]
            for opened in jobs:
                opened.result()

    def _open(self, task: int, samples: int) -> None:
        self.part(task).open(samples)


# Where a phase begins: at these ordinals, if all samples of the run are of one kind, or positions.
Starts = np.ndarray | Sequence[StreamPosition] | PhaseStart


# The content of `index.json` of a plan, and of the tables of each task by their fingerprint.
Headers = tuple[dict[str, Any], dict[str, dict[str, dict[str, Any]]]]


class Plan:
    """Random access to every sample of every phase, from memory-mapped files."""

    def __init__(self, spec: PlanSpec, folder: Path, headers: Headers | None = None) -> None:
        """
        Args:
            headers: `headers()` of another process's plan, whose files are known to be usable.
        """
        self.spec = spec
        self.folder = folder
        if all(stream.tables.folder is None for stream in spec.streams.values()):
            spec.store_tables(folder.parent)
        self.tasks = list(spec.streams)
        header, tables = headers or (None, {})
        for task, known in tables.items():
            spec.streams[task].tables.headers |= known
        self._index = StoredIndex(folder, spec, header)
        self.phases = self._index.phases
        self._block = block_size(len(self.tasks))
        self._task_streams = list(spec.task_streams.values())
        self._used = np.array([spec.used[task] for task in self.tasks], np.int64)
        self._first_ordinals = [np.array(phase.starts, np.int64) for phase in self.phases]
        self._planned: dict[int, PhaseStart] = {}

    def store_counts(self) -> None:
        """Store the numbers of the corpora that were found, so that they need not be found again.

        Raises:
            RunError: they cannot be written.
        """
        if self.folder.is_dir():  # not a temporary one
            with os_errors_named(self.folder.parent):
                self.spec.known.store(self.folder.parent)

    def headers(self) -> Headers:
        """Return the headers of all files that are open, from which other processes open them."""
        tables = {task: stream.tables.headers for task, stream in self.spec.streams.items()}
        return self._index.header, {task: known for task, known in tables.items() if known}

    @property
    def files(self) -> list[VerifiedFile]:
        """The files of its index, and of the tables of packed documents that are open."""
        tables = [file for s in self.spec.streams.values() for file in s.tables.files]
        return [*self._index.files, *tables]

    def counts(self, phase: int, steps: int) -> np.ndarray:
        """Return the samples of every task in the first `steps` steps of a phase, int64 [tasks]."""
        samples = self.spec.phases[phase].batch.samples_before(steps)
        order, counts = self._index.blends[phase]
        if not 0 <= samples <= len(order):
            raise ValueError(f"{self.phases[phase].name} has no {steps} steps")
        block = min(samples // self._block, len(counts) - 1)
        since = order.rows(block * self._block, samples)
        before = counts.rows(block, block + 1)[0]
        found: np.ndarray = before + np.bincount(since, minlength=len(self.tasks))
        return found

    def rates(self, phase: int, steps: np.ndarray) -> np.ndarray:
        """Return the effective rate of every task in steps of a phase, float64 [points, tasks].

        Where rates change, each is the mean over the samples of its step.

        steps: int64 [points], 0-based in the phase
        """
        return self._step_rates(phase).in_steps(steps)

    def _step_rates(self, phase: int) -> StepRates:
        return StepRates(
            self.spec.phases[phase],
            self.phases[phase],
            lambda: self.spec.supply(phase, self.phase_start(phase).positions),
        )

    def first_ordinals(self, phase_steps: Sequence[int]) -> np.ndarray:
        """Return the ordinals at which streams continue after phases of these lengths, int64
        [tasks]."""
        return self._used + sum(self.counts(i, steps) for i, steps in enumerate(phase_steps))

    def positions(self, phase_steps: Sequence[int]) -> list[StreamPosition]:
        """Return the positions from which streams continue after phases of these lengths."""
        positions = self.spec.starts
        for number, steps in enumerate(phase_steps):
            positions = self.advanced(positions, number, self.counts(number, steps))
        return positions

    def advanced(
        self, positions: Sequence[StreamPosition], phase: int, counts: np.ndarray
    ) -> list[StreamPosition]:
        """Return the positions after `counts` samples of every task, int64 [tasks], of a phase."""
        kind = self.spec.phases[phase].kind
        return [
            at.after(stream.kind_of(kind), n)
            for stream, at, n in zip(self._task_streams, positions, counts.tolist(), strict=True)
        ]

    def phase_start(self, phase: int, starts: Starts | None = None) -> PhaseStart:
        """Return where the streams continue in a phase, by default as planned.

        Raises:
            ValueError: the phase cannot begin there.
        """
        if isinstance(starts, PhaseStart):
            return starts
        if starts is None:
            if phase not in self._planned:
                planned = self.spec.starts
                for number in range(phase):
                    counts = np.array(self.phases[number].counts, np.int64)
                    planned = self.advanced(planned, number, counts)
                self._planned[phase] = self._start(phase, planned)
            return self._planned[phase]
        if isinstance(starts, np.ndarray):
            if not self.spec.has_one_kind:
                raise ValueError("samples have several lengths: ordinals alone are no position")
            kind = self.spec.phases[phase].kind
            starts = [StreamPosition().after(kind, n) for n in starts.tolist()]
        ordinals = np.array([each.samples for each in starts], np.int64)
        if ((ordinals < self._used) | (ordinals > self._first_ordinals[phase])).any():
            raise ValueError(f"{self.phases[phase].name} cannot begin at ordinals {ordinals}")
        return self._start(phase, starts)

    def open_phase(self, phase: int, starts: Starts | None = None) -> PhaseStart:
        """Return `phase_start`, and build the tables of packed documents that the phase needs.

        Raises as PhaseStart.open does.
        """
        start = self.phase_start(phase, starts)
        start.open(self.phases[phase].counts)
        return start

    def _start(self, phase: int, positions: Sequence[StreamPosition]) -> PhaseStart:
        kind = self.spec.phases[phase].kind
        return PhaseStart(self._task_streams, positions, kind, self._index.starts)

    def samples(
        self, phase: int, first: int, count: int, starts: Starts | None = None
    ) -> PlannedSamples:
        """Return the samples [first, first + count) of a phase, in order.

        starts: from where the streams continue, if an earlier phase has ended early; by default
                from where the plan has them continue
        """
        start = self.phase_start(phase, starts)
        order, counts = self._index.blends[phase]
        ordinals = np.empty(count, np.int64)
        block = first // self._block
        since = order.rows(block * self._block, first + count)
        before = counts.rows(block, block + 1)
        _builder.phase_ordinals(since, before, self._block, first - block * self._block, ordinals)
        tasks = since[first - block * self._block :].astype(np.int64)
        return PlannedSamples(tasks, ordinals + start.ordinals[tasks], start)

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
            part = samples.start.part(task)
            part.read(samples.ordinals[rows], rows, inputs, targets, pad_token_id, documents)

    def summary(self) -> dict[str, Any]:
        """Return tokens, rates and epochs per phase and task, as in the run's `plan.json`."""
        spec = self.spec
        phases, first_step, positions = [], 0, spec.starts
        kinds = {phase.kind for phase in spec.phases}
        for number, phase in enumerate(self.phases):
            kind, before = spec.phases[number].kind, positions
            positions = self.advanced(before, number, np.array(phase.counts, np.int64))
            phases.append(
                {
                    "name": phase.name,
                    "order": spec.phases[number].order,
                    **({} if kinds == {spec.kind} else {"seq_len": kind.seq_len}),
                    **({} if kind.cut == "tokens" else {"cut": kind.cut}),
                    "steps": phase.steps,
                    "first_step": first_step,
                    "samples": phase.samples,
                    "batch": [
                        {"first_step": stage.first_step, "steps": steps, "samples": stage.samples}
                        for stage, steps in spec.phases[number].batch.within(phase.steps)
                    ],
                    "tokens": phase.samples * kind.seq_len,
                    "tasks": {
                        task: self._task_figures(number, i, before[i], positions[i])
                        for i, task in enumerate(self.tasks)
                    },
                    **self._step_rates(number).summary(self.tasks),
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
                    **_test_documents(spec, task),
                    "text_bytes": stream.text_bytes(),
                }
                for task, stream in spec.streams.items()
            },
            "phases": phases,
        }

    def _samples_per_step(self) -> dict[str, int]:
        """The samples of a step, where all steps of the run have equally many."""
        stages = [phase.batch.within(phase.steps) for phase in self.spec.phases]
        sizes = {stage.samples for of_phase in stages for stage, _ in of_phase}
        return {"samples_per_step": sizes.pop()} if len(sizes) == 1 else {}

    def _task_figures(
        self, number: int, task: int, before: StreamPosition, after: StreamPosition
    ) -> dict[str, Any]:
        """Return the figures of a task in a phase, which begins and ends at these positions."""
        phase, kind = self.phases[number], self.spec.phases[number].kind
        samples = phase.counts[task]
        if self.spec.has_one_kind:
            stream = self._task_streams[task].at(kind)
            epochs, so_far = stream.epochs(samples), stream.epochs(after.samples)
        else:
            used = [self._task_streams[task].epochs(each) for each in (before, after)]
            epochs, so_far = float(used[1] - used[0]), float(used[1])
        figures = {
            "requested_rate": phase.requested_rates[task],
            "rate": phase.rates[task],
            **_from_to(phase, task),
            "samples": samples,
            "tokens": samples * kind.seq_len,
            "epochs": epochs,
            "epochs_so_far": so_far,
        }
        padding = self._padding(number, task) if samples else None
        return figures if padding is None else figures | {"padding": padding}

    def _padding(self, number: int, task: int) -> float | None:
        """Return the share of positions without an input, where documents are packed by best
        fit."""
        part = self.phase_start(number).part(task)
        if not isinstance(part.stream, DocumentStream):
            return None
        return part.stream.padding(part.rest, self.phases[number].counts[task])


def _test_documents(spec: PlanSpec, task: str) -> dict[str, int]:
    """The number of a task's documents in its test split, if it has one."""
    return {"test_documents": spec.test[task].documents} if task in spec.test else {}


def _from_to(phase: PhaseIndex, task: int) -> dict[str, list[float]]:
    """Return a task's rates at a phase's start and end, if rates change within the phase."""
    if phase.requested_from_to is None or phase.rates_from_to is None:
        return {}
    return {
        "requested_from_to": [rates[task] for rates in phase.requested_from_to],
        "rate_from_to": [rates[task] for rates in phase.rates_from_to],
    }
