"""Read what a run left in its directory: `run.json`, `plan.json` and `metrics.jsonl`.

A run that is still going reads like a finished one; it only has fewer rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaphase.errors import InputError

NUMBER = (int, float)
RATE_NOISE = 1e-9  # a temperature gives the same rate in two phases only up to rounding


@dataclass(frozen=True)
class CorpusSize:
    """How much text a task has."""

    documents: int
    tokens: int
    held_out_documents: int
    text_bytes: int


@dataclass(frozen=True)
class TaskShare:
    """What one phase plans for one task; `rate` is its sampling rate, 0 to 1."""

    rate: float
    samples: int
    tokens: int
    epochs: float
    epochs_so_far: float


@dataclass(frozen=True)
class PhasePlan:
    """One planned phase; `first_step` counts the steps before it."""

    name: str
    steps: int
    first_step: int
    samples: int
    tokens: int
    optimizer_state: str
    tasks: Mapping[str, TaskShare]


@dataclass(frozen=True)
class Plan:
    """The part of a run's plan that a reader wants to know."""

    seq_len: int
    samples_per_step: int
    tasks: Mapping[str, CorpusSize]
    phases: tuple[PhasePlan, ...]


@dataclass(frozen=True)
class TrainingRow:
    """One optimizer step; losses in nats per token, `step` counts from 1 over the whole run."""

    step: int
    phase: str
    phase_step: int
    tokens: int
    loss: float
    loss_by_task: Mapping[str, float]
    learning_rate: float
    grad_norm: float
    step_seconds: float
    tokens_per_second: float
    mfu: float | None


@dataclass(frozen=True)
class ValidationRow:
    """Held-out losses after `step` steps: nats per token and bits per byte of text."""

    step: int
    phase: str
    loss: Mapping[str, float]
    bits_per_byte: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """All that a run directory tells. Rows are in the order of their steps."""

    directory: Path
    name: str
    settings: Mapping[str, Any]
    plan: Plan
    training: tuple[TrainingRow, ...]
    validation: tuple[ValidationRow, ...]
    events: tuple[Mapping[str, Any], ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """All task names, in the plan's order."""
        return tuple(self.plan.tasks)

    @property
    def low_resource_tasks(self) -> frozenset[str]:
        """Tasks that the first phase leaves out, or that a later phase samples more often."""
        rates = {
            task: [p.tasks[task].rate if task in p.tasks else 0.0 for p in self.plan.phases]
            for task in self.tasks
        }
        return frozenset(
            task
            for task, rate in rates.items()
            if rate[0] == 0 or any(later > rate[0] + RATE_NOISE for later in rate[1:])
        )

    @property
    def last_step(self) -> int:
        """Steps done so far, as far as the metrics tell."""
        return max([row.step for row in self.rows], default=0)

    @property
    def rows(self) -> tuple[TrainingRow | ValidationRow, ...]:
        """All measurements."""
        return (*self.training, *self.validation)

    def validation_in(self, phase: str) -> tuple[ValidationRow, ...]:
        """The validation rows of one phase, from its start to its end."""
        return tuple(row for row in self.validation if row.phase == phase)

    def phase_start(self, phase: str) -> int | None:
        """Steps done when the phase began; None if it has not begun.

        Measured, not planned: a phase that an overfitting stop cut short ends before its plan.
        """
        steps = [row.step for row in self.validation if row.phase == phase]
        steps += [row.step - 1 for row in self.training if row.phase == phase]
        return min(steps, default=None)

    def phase_is_over(self, phase: str) -> bool:
        """Whether the phase has ended, as planned or early."""
        if any(e["event"] == "phase_end" and e.get("phase") == phase for e in self.events):
            return True
        plan = next(p for p in self.plan.phases if p.name == phase)
        return any(r.step >= plan.first_step + plan.steps for r in self.validation_in(phase))

    @property
    def phases_begun(self) -> tuple[PhasePlan, ...]:
        """The phases of which anything has been measured."""
        return tuple(p for p in self.plan.phases if self.phase_start(p.name) is not None)

    @property
    def switch_steps(self) -> tuple[tuple[int, str], ...]:
        """(steps done, name of the phase that begins) of every switch that has happened."""
        starts = [(self.phase_start(p.name), p.name) for p in self.plan.phases[1:]]
        return tuple((step, name) for step, name in starts if step is not None)


def load_run(run_dir: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        InputError: a file is missing or not what it should be; names the file, and the line of a
            broken row in `metrics.jsonl`. Its last line may be half-written and is then left out.
    """
    if not run_dir.is_dir():
        raise InputError(run_dir, "is not a directory", "give the directory of a run")
    settings = _json_object(run_dir / "run.json")
    plan = _plan(run_dir / "plan.json")
    name = run_dir.resolve().name
    run = RunRecord(run_dir, name, settings, plan, *_metrics(run_dir / "metrics.jsonl"))
    known = {phase.name for phase in plan.phases}
    for row in run.rows:
        if row.phase not in known:
            raise InputError(
                run_dir / "metrics.jsonl",
                f"step {row.step} is of phase {row.phase!r}, which plan.json does not have",
                "the two files are of different runs",
            )
    return run


class _Fields:
    """Checked access to the keys of one JSON object; `where` names it in errors."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise InputError(where, "is not a JSON object")
        self.value = value
        self.where = where

    def get(self, key: str, kinds: type | tuple[type, ...]) -> Any:
        if key not in self.value:
            raise InputError(self.where, f"has no {key!r}", "was it written by megaphase train?")
        found = self.value[key]
        if not isinstance(found, kinds) or isinstance(found, bool):
            raise InputError(self.where, f"{key!r} is {found!r}, which is of the wrong type")
        return found

    def inner(self, key: str) -> Iterator[tuple[str, _Fields]]:
        for name, value in self.get(key, dict).items():
            yield name, _Fields(value, f"{self.where}: {key}.{name}")

    def numbers(self, key: str) -> dict[str, float]:
        values = _Fields(self.get(key, dict), f"{self.where}: {key}")
        return {name: float(values.get(name, NUMBER)) for name in values.value}


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(path, "does not exist", "give the directory of a run") from None
    except ValueError as error:
        raise InputError(path, f"is not valid JSON ({error})") from None
    return _Fields(value, str(path)).value


def _plan(path: Path) -> Plan:
    fields = _Fields(_json_object(path), str(path))
    tasks = {
        name: CorpusSize(
            documents=task.get("documents", int),
            tokens=task.get("tokens", int),
            held_out_documents=task.get("held_out_documents", int),
            text_bytes=task.get("text_bytes", int),
        )
        for name, task in fields.inner("tasks")
    }
    phases = tuple(
        _phase(_Fields(phase, f"{path}: phases.{i}"), tasks)
        for i, phase in enumerate(fields.get("phases", list))
    )
    if not phases:
        raise InputError(path, "has no phase")
    return Plan(fields.get("seq_len", int), fields.get("samples_per_step", int), tasks, phases)


def _phase(fields: _Fields, known_tasks: Mapping[str, CorpusSize]) -> PhasePlan:
    shares = {
        name: TaskShare(
            rate=float(share.get("rate", NUMBER)),
            samples=share.get("samples", int),
            tokens=share.get("tokens", int),
            epochs=float(share.get("epochs", NUMBER)),
            epochs_so_far=float(share.get("epochs_so_far", NUMBER)),
        )
        for name, share in fields.inner("tasks")
    }
    for name in shares:
        if name not in known_tasks:
            raise InputError(fields.where, f"task {name!r} is not among the plan's tasks")
    return PhasePlan(
        name=fields.get("name", str),
        steps=fields.get("steps", int),
        first_step=fields.get("first_step", int),
        samples=fields.get("samples", int),
        tokens=fields.get("tokens", int),
        optimizer_state=fields.get("optimizer_state", str),
        tasks=shares,
    )


def _metrics(
    path: Path,
) -> tuple[tuple[TrainingRow, ...], tuple[ValidationRow, ...], tuple[Mapping[str, Any], ...]]:
    # Keyed by step, so that a row written again after a resume takes the place of the first.
    training: dict[int, TrainingRow] = {}
    validation: dict[tuple[int, str], ValidationRow] = {}
    events: list[Mapping[str, Any]] = []
    for where, value in _json_lines(path):
        fields = _Fields(value, where)
        step = fields.get("step", int)
        if "event" in value:
            fields.get("event", str)
            events.append(value)
        elif "validation" in value:
            phase = fields.get("phase", str)
            validation[step, phase] = _validation_row(step, phase, fields)
        elif "loss" in value:
            training[step] = _training_row(step, fields)
        else:
            raise InputError(where, "is no row of training, validation or event")
    return (
        tuple(training[step] for step in sorted(training)),
        # A stable sort: the end of one phase and the start of the next share a step.
        tuple(sorted(validation.values(), key=lambda row: row.step)),
        tuple(events),
    )


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for each line; a broken last line is taken for one being written."""
    broken: InputError | None = None
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if broken is not None:
                    raise broken
                where = f"{path}:{number}"
                try:
                    value = json.loads(line)
                except ValueError as error:
                    broken = InputError(where, f"is not valid JSON ({error})", "mend the line")
                    continue
                yield where, value
    except FileNotFoundError:
        raise InputError(path, "does not exist", "has the run begun?") from None


def _validation_row(step: int, phase: str, fields: _Fields) -> ValidationRow:
    by_task = dict(fields.inner("validation"))
    return ValidationRow(
        step=step,
        phase=phase,
        loss={task: float(v.get("loss", NUMBER)) for task, v in by_task.items()},
        bits_per_byte={task: float(v.get("bits_per_byte", NUMBER)) for task, v in by_task.items()},
    )


def _training_row(step: int, fields: _Fields) -> TrainingRow:
    mfu = fields.get("mfu", (*NUMBER, type(None)))
    return TrainingRow(
        step=step,
        phase=fields.get("phase", str),
        phase_step=fields.get("phase_step", int),
        tokens=fields.get("tokens", int),
        loss=float(fields.get("loss", NUMBER)),
        loss_by_task=fields.numbers("loss_by_task"),
        learning_rate=float(fields.get("learning_rate", NUMBER)),
        grad_norm=float(fields.get("grad_norm", NUMBER)),
        step_seconds=float(fields.get("step_seconds", NUMBER)),
        tokens_per_second=float(fields.get("tokens_per_second", NUMBER)),
        mfu=None if mfu is None else float(mfu),
    )
