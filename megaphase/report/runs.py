"""The records in a run's directory: its plan, the rows of its metrics, its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from megaphase.plan.origin import RunOrigin
from megaphase.report.measured import Measured
from megaphase.report.phase_rates import RatesOverSteps
from megaphase.report.training_rows import TrainingRows
from megaphase.utils.metrics_rows import Steps, steps_in_words
from megaphase.utils.run_files import METRICS_FILE


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class CorpusSize(_Record):
    """The size of a task's text."""

    documents: int
    tokens: int
    held_out_documents: int
    text_bytes: int


class TaskShare(_Record):
    """The part of one task in a phase; `rate` is its sampling rate, 0 to 1."""

    rate: float
    samples: int
    tokens: int
    epochs: float
    epochs_so_far: float


class BatchRange(_Record):
    """Steps of a phase with one batch: their number, and the samples of each of them."""

    steps: int
    samples: int


class PhasePlan(_Record):
    """One phase as planned or, if it ended early, as it was, and why it ended.

    seq_len: None where all phases have that of the `model` section.
    batch: in the order of the steps; empty in plans of earlier versions.
    """

    name: str
    steps: int
    seq_len: int | None = None
    tokens: int
    batch: list[BatchRange] = []
    tasks: dict[str, TaskShare]
    rates_over_steps: RatesOverSteps | None = None
    ended_early: str | None = None

    def part(self, steps: int, task: str | None = None) -> float:
        """Return the fraction of the phase's samples, or of a task's, that its first steps have."""
        steps = min(max(steps, 0), self.steps)
        rates = self.rates_over_steps
        if task is not None and rates is not None and (whole := rates.samples_of(task)):
            return rates.until(steps).samples_of(task) / whole
        return self._samples(steps) / max(self._samples(self.steps), 1)

    def batch_until(self, steps: int) -> list[BatchRange]:
        """Return the batch of the phase's first steps alone."""
        found, left = [], steps
        for each in self.batch:
            if left > 0:
                found.append(each.model_copy(update={"steps": min(each.steps, left)}))
            left -= each.steps
        return found

    def _samples(self, steps: int) -> int:
        """Return the samples of the first steps; their number if the batch is not known."""
        if not self.batch:
            return steps
        return sum(each.steps * each.samples for each in self.batch_until(steps))


class PlanRecord(_Record):
    """The plan's figures per phase and task.

    seq_len: of the `model` section.
    """

    seq_len: int | None = None
    tasks: dict[str, CorpusSize]
    phases: list[PhasePlan]


class _Row(_Record):
    step: int
    phase: str


class HeldOutRow(_Record):
    """A task's validation loss, in nats per token and in bits per byte of text.

    gap: its difference to the training loss since the previous validation; None if the task was not
    trained on.
    """

    loss: Measured
    bits_per_byte: Measured
    gap: float | None = None


class ValidationRow(_Row):
    """Held-out losses after `step` steps; a switch has one row for each of its two phases.

    validation_average: those of the average of the phase's weights; empty if it has none yet.
    """

    validation: dict[str, HeldOutRow]
    validation_average: dict[str, HeldOutRow] = {}


class BenchmarkRow(_Row):
    """Figures of benchmarks after `step` steps by task and metric; benchmark_groups: the means of
    groups of tasks."""

    benchmarks: dict[str, dict[str, Measured]]
    benchmark_groups: dict[str, dict[str, Measured]] = {}


class Event(_Record):
    """An event after `step` steps."""

    step: int
    event: str
    phase: str | None = None
    reason: str | None = None
    kind: str | None = None
    since: int | None = None
    trained_tokens: tuple[int, int] | None = None
    loss: Measured | None = None
    loss_before: Measured | None = None
    exceeded: dict[str, dict[str, Measured]] = {}


@dataclass(frozen=True)
class RunRecord:
    """The records in a run directory. Rows are in the order of their steps.

    missing_steps: steps whose training rows are missing in the metrics, though they were done.
    unreadable_lines: number of unreadable lines of the metrics.
    """

    directory: Path
    name: str
    settings: Mapping[str, Any]
    plan: PlanRecord
    training: TrainingRows
    validation: Sequence[ValidationRow]
    events: Sequence[Event]
    origin: RunOrigin
    missing_steps: Sequence[Steps] = ()
    unreadable_lines: int = 0
    benchmarks: Sequence[BenchmarkRow] = ()

    @property
    def hole(self) -> str | None:
        """What is missing in the metrics, in words, or None."""
        parts = []
        if self.missing_steps:
            parts.append(f"the rows of {steps_in_words(self.missing_steps)} are missing")
        if self.unreadable_lines:
            plural = "s" if self.unreadable_lines > 1 else ""
            parts.append(f"{self.unreadable_lines:,} line{plural} cannot be read")
        return f"{METRICS_FILE} is damaged: {' and '.join(parts)}" if parts else None

    @property
    def low_resource_tasks(self) -> frozenset[str]:
        """The tasks that the first of several phases does not train on.

        The first phases of a branch are those of the run from which it started. A first phase
        that trains the rows of new tokens alone leaves out what the model knows already: where
        the run file has roles, they are then the tasks on which it does train, of several.
        Conversations without a role are never low-resource.
        """
        return self._tasks_that_come_later - (self._chats - self.roles.keys())

    @property
    def _tasks_that_come_later(self) -> frozenset[str]:
        if self.origin.step:
            return frozenset(t for t in self.plan.tasks if not self.origin.used.get(t))
        if len(self.plan.phases) == 1:
            return frozenset()
        first = self.plan.phases[0]
        trained = {task for task, share in first.tasks.items() if share.samples}
        others = frozenset(task for task in self.plan.tasks if task not in trained)
        if self.roles and first.name in self.trained_tokens:
            return frozenset(self.plan.tasks) - others if others else frozenset()
        return others

    @property
    def roles(self) -> Mapping[str, str]:
        """The role in the run file of every task that has one."""
        found = {name: task.get("role") for name, task in self._task_settings.items()}
        return {name: role for name, role in found.items() if isinstance(role, str)}

    @property
    def _chats(self) -> frozenset[str]:
        """The tasks that are conversations."""
        return frozenset(n for n, task in self._task_settings.items() if task.get("kind") == "chat")

    @property
    def _task_settings(self) -> Mapping[str, Mapping[str, Any]]:
        """The sections of the run file of the plan's tasks."""
        tasks = self.settings.get("tasks")
        return {
            name: task
            for name, task in (tasks if isinstance(tasks, dict) else {}).items()
            if name in self.plan.tasks and isinstance(task, dict)
        }

    @property
    def groups(self) -> tuple[str, str]:
        """The names of the low-resource tasks and of the others: their roles, if any has one."""
        low = self.low_resource_tasks
        if not self.roles:
            return "low-resource", "high-resource" if not self._chats else "others"
        names = [
            dict.fromkeys(
                self.roles.get(task, "no role")
                for task in self.plan.tasks
                if (task in low) is is_low
            )
            for is_low in (True, False)
        ]
        return ", ".join(names[0]), ", ".join(names[1])

    def group_of(self, task: str) -> str | None:
        """Return a task's role in the run file; `low-resource` if it is and no task has a role."""
        if self.roles:
            return self.roles.get(task)
        return "low-resource" if task in self.low_resource_tasks else None

    @property
    def tasks(self) -> list[str]:
        """All tasks in the plan's order, with the low-resource ones last."""
        low = self.low_resource_tasks
        return sorted(self.plan.tasks, key=lambda task: task in low)

    @property
    def last_step(self) -> int:
        """Steps done so far, according to the metrics."""
        steps = [row.step for row in self.validation[-1:]]
        steps += self.training.step[-1:].tolist()
        return max(steps, default=self.origin.step)

    @property
    def planned_steps(self) -> int:
        """The run's last step, if no other phase ends early."""
        return self.origin.step + sum(phase.steps for phase in self.plan.phases)

    @property
    def ended_diverged(self) -> Event | None:
        """The event that ended the run, if it was a divergence after which no step was trained."""
        ends = [e for e in self.events if e.event == "divergence_stop" and e.step >= self.last_step]
        return ends[-1] if ends else None

    def model_of(self, phase: PhasePlan) -> dict[str, Any]:
        """Return the phase's sequence length, and the keys of its rotary positions that it sets."""
        phases = self.settings.get("phases")
        sections = [
            section.get("model")
            for section in (phases if isinstance(phases, list) else [])
            if isinstance(section, dict) and section.get("name") == phase.name
        ]
        keys = sections[0] if sections and isinstance(sections[0], dict) else {}
        given = {key: value for key, value in keys.items() if value is not None}
        return given | {"seq_len": phase.seq_len or self.plan.seq_len}

    def epochs_of_phases(self, task: str) -> float:
        """Return the passes over the task's training text in the phases of this run alone."""
        return sum(p.tasks[task].epochs for p in self.plan.phases if task in p.tasks)

    def planned_epochs(self, task: str) -> float:
        """Return the passes over the task's training text, those before a branch included."""
        shares = [phase.tasks[task] for phase in self.plan.phases if task in phase.tasks]
        return max((share.epochs_so_far for share in shares), default=0.0)

    def validation_in(self, phase: str) -> list[ValidationRow]:
        """Return the validation rows of one phase, from its start to its end."""
        return [row for row in self.validation if row.phase == phase]

    def phase_start(self, phase: str) -> int | None:
        """Return the steps done when the phase actually began; None if it has not begun."""
        steps = [row.step for row in self.validation_in(phase)]
        trained = self.training.step[self.training.are_of(phase)]
        steps += (trained[:1] - 1).tolist()
        return min(steps, default=None)

    def phase_is_over(self, phase: PhasePlan) -> bool:
        """Return whether the phase has ended, as planned or early."""
        return any(e.event == "phase_end" and e.phase == phase.name for e in self.events)

    @property
    def phases_begun(self) -> list[PhasePlan]:
        """The phases in which anything has been measured."""
        return [p for p in self.plan.phases if self.phase_start(p.name) is not None]

    @property
    def trained_tokens(self) -> dict[str, tuple[int, int]]:
        """For each phase that trains the rows of some tokens alone, the first id and the one after
        the last."""
        return {
            event.phase: event.trained_tokens
            for event in self.events
            if event.phase is not None and event.trained_tokens is not None
        }

    @property
    def switches(self) -> list[tuple[int, str]]:
        """(steps done, name of the phase that begins) of every switch so far."""
        phases = self.plan.phases if self.origin.step else self.plan.phases[1:]
        starts = [(self.phase_start(p.name), p.name) for p in phases]
        return [(step, name) for step, name in starts if step is not None]
