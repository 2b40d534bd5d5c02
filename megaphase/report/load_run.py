"""Read a run's directory: `run.json`, `plan.json`, `metrics.jsonl`, `origin.json`.

A run in progress is read like a finished one; it only has fewer rows. Phases that ended early have
their actual length, and a branch continues the step count of the run before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import RootModel, ValidationError

from megaphase.checkpoint.names import newest_state
from megaphase.plan.origin import read_origin
from megaphase.plan.run_history import RunHistory, read_history
from megaphase.report.runs import (
    BenchmarkRow,
    Event,
    PhasePlan,
    PlanRecord,
    RunRecord,
    TaskShare,
    ValidationRow,
)
from megaphase.report.training_rows import TrainingRows, TrainingRowsReader
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path
from megaphase.utils.json_models import read_record
from megaphase.utils.metrics_rows import Row, is_training, missing_steps, read_lines
from megaphase.utils.run_files import METRICS_FILE, PLAN_FILE, RUN_FILE

REMEDY = "give the directory of a run of megaphase train"


def load_run(run_dir: Path) -> RunRecord:
    """Read a run directory, even while the run is in progress.

    Raises:
        InputError: a file is missing or invalid; names the file. Lines of `metrics.jsonl` that are
            not rows are ignored and counted.
    """
    if not run_dir.is_dir():
        raise InputError(run_dir, "is not a directory", REMEDY)
    settings = read_record(run_dir / RUN_FILE, RootModel[dict[str, Any]], REMEDY).root
    plan = read_record(run_dir / PLAN_FILE, PlanRecord, REMEDY)
    metrics = _read_metrics(run_dir / METRICS_FILE)
    known = {phase.name for phase in plan.phases}
    origin, history = read_origin(run_dir), read_history(run_dir)
    events = [*metrics.events, *_lost_ends(history, metrics.events)]
    plan = _with_actual_lengths(plan, origin.step, events)
    name = real_path(run_dir).name
    training, validation = metrics.training, metrics.validation
    run = RunRecord(run_dir, name, settings, plan, training, validation, events, origin)
    done = max(run.last_step, (newest_state(run_dir) or {}).get("step", 0))
    missing = missing_steps(training.step.tolist(), origin.step + 1, done)
    run = replace(
        run,
        missing_steps=missing,
        unreadable_lines=metrics.unreadable,
        benchmarks=metrics.benchmarks,
    )
    for step, phase in _first_steps(run):
        if phase not in known:
            raise InputError(
                run_dir / METRICS_FILE,
                f"step {step} is of phase {phase!r}, which plan.json does not have",
                "the two files are of different runs",
            )
    return run


def _first_steps(run: RunRecord) -> Iterator[tuple[int, str]]:
    """Yield steps and the phases to which they belong, those of training the first of a phase."""
    for phase in run.training.phases:
        for step in run.training.step[run.training.are_of(phase)][:1].tolist():
            yield step, phase
    for row in run.validation:
        yield row.step, row.phase


def _lost_ends(history: RunHistory, events: Sequence[Event]) -> list[Event]:
    """Return the ends of phases that are recorded in checkpoints but not in the metrics."""
    told = {event.phase for event in events if event.event == "phase_end"}
    return [
        Event(step=phase.ended_after, event="phase_end", phase=phase.name, reason=phase.reason)
        for phase in history.phases
        if phase.ended_after is not None and phase.name not in told
    ]


def _with_actual_lengths(plan: PlanRecord, step: int, events: Sequence[Event]) -> PlanRecord:
    """Return the plan with the actual lengths of the phases that have ended.

    step: steps done before the first phase.
    """
    ends = {event.phase: event for event in events if event.event == "phase_end"}
    phases: list[PhasePlan] = []
    left_out = dict.fromkeys(plan.tasks, 0.0)  # epochs
    for phase in plan.phases:
        end = ends.get(phase.name)
        steps = phase.steps if end is None else end.step - step
        reason = end.reason or "" if end is not None and steps < phase.steps else None
        phases.append(_shortened(phase, steps, reason, left_out))
        step += steps
    return plan.model_copy(update={"phases": phases})


def _shortened(
    phase: PhasePlan, steps: int, reason: str | None, left_out: dict[str, float]
) -> PhasePlan:
    """Return a phase of `steps` steps, with each task's share of it, within one sample.

    left_out: missing epochs by task of the phases before; those of this one are added.
    """
    whole = phase.rates_over_steps
    rates = None if whole is None else whole.until(steps)
    tasks = {}
    for task, share in phase.tasks.items():
        part, rate = phase.part(steps, task), share.rate
        if rates is not None and steps < phase.steps:
            rate = rates.samples_of(task) / max(rates.samples[-1], 1)
        left_out[task] = left_out.get(task, 0.0) + share.epochs * (1 - part)
        tasks[task] = TaskShare(
            rate=rate,
            samples=round(share.samples * part),
            tokens=round(share.tokens * part),
            epochs=share.epochs * part,
            epochs_so_far=share.epochs_so_far - left_out[task],
        )
    return PhasePlan(
        name=phase.name,
        steps=steps,
        seq_len=phase.seq_len,
        tokens=round(phase.tokens * phase.part(steps)),
        batch=phase.batch_until(steps),
        tasks=tasks,
        rates_over_steps=rates,
        ended_early=reason,
    )


@dataclass(frozen=True)
class _Metrics:
    training: TrainingRows
    validation: list[ValidationRow]
    events: list[Event]
    benchmarks: list[BenchmarkRow]
    unreadable: int


def _read_metrics(path: Path) -> _Metrics:
    # By step, so that a row written again after a resume replaces the earlier one.
    training = TrainingRowsReader()
    validation: dict[tuple[int, str], ValidationRow] = {}
    benchmarks: dict[tuple[int, str], BenchmarkRow] = {}
    events: list[Event] = []
    unreadable = 0
    if not path.is_file():
        raise InputError(path, "no such file", "wait until the run has begun")
    for line in read_lines(path):  # without a line that is being written now
        if line.row is not None and is_training(line.row):
            training.add(line.row)
            continue
        row = None if line.row is None else _read_row(line.row)
        if row is None:
            unreadable += 1
        elif isinstance(row, ValidationRow):
            validation[row.step, row.phase] = row
        elif isinstance(row, BenchmarkRow):
            benchmarks[row.step, row.phase] = row
        else:
            events.append(row)
    rows = training.finish()
    return _Metrics(
        rows,
        # A stable sort: the end of one phase and the start of the next share a step.
        sorted(validation.values(), key=lambda row: row.step),
        events,
        sorted(benchmarks.values(), key=lambda row: row.step),
        unreadable + training.unreadable,
    )


_KINDS: dict[str, type[ValidationRow | BenchmarkRow | Event]] = {
    "event": Event,
    "validation": ValidationRow,
    "benchmarks": BenchmarkRow,
}


def _read_row(value: Row) -> ValidationRow | BenchmarkRow | Event | None:
    kind = next(kind for key, kind in _KINDS.items() if key in value)
    with suppress(ValidationError):
        return kind.model_validate(value)
    return None
