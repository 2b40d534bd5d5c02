"""The status of a run, from its metrics and from Slurm's information about its job."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megaphase.checkpoint.names import newest_state
from megaphase.checkpoint.state import full_name
from megaphase.launch.slurm.activity import is_trained
from megaphase.launch.slurm.job_file import OVER, read_job
from megaphase.plan.origin import read_origin
from megaphase.plan.run_history import metrics_problem, read_history
from megaphase.training.resume_point import loss_sentence
from megaphase.utils.errors import InputError
from megaphase.utils.files import read_hashed_json, read_json
from megaphase.utils.metrics_rows import last_rows
from megaphase.utils.run_files import METRICS_FILE, PLAN_FILE, RUN_FILE
from megaphase.utils.slurm import JobRecord, look_up

_RECENT_STEPS = 50


@dataclass(frozen=True)
class Status:
    """The status of a run; None for values that are not known.

    Attributes:
        run: its directory.
        job: the id of the last submitted job.
        state: Slurm's name of the job's state, or Megaphase's if Slurm has none.
        reason: why the job waits, or has failed.
        nodes, excluded: nodes on which it runs, and must not run, as Slurm's lists of nodes.
        restarts: number of restarts of the job.
        phase: the phase that is trained now, or was last.
        step, steps: trained and planned steps of the whole run; a phase that has ended counts with
            the steps that it had.
        done: whether the last phase has ended.
        loss: of the last step.
        divergence: whether training diverges now, or the run has ended because it did.
        tokens_per_second: the median of the last steps.
        remaining_seconds: of training, at that speed, if no phase ends early; None if nobody trains
            the run.
        idle_seconds: time since the last row of metrics.
        log: the job's log.
        metrics_problem: what is missing in the run's metrics, in words.
        training: whether a process trains the run now.
        stopped: where and why training has stopped, in words.
    """

    run: str
    job: str | None
    state: str | None
    reason: str | None
    nodes: str | None
    excluded: str | None
    restarts: int | None
    phase: str | None
    step: int
    steps: int | None
    done: bool
    loss: float | None
    divergence: str | None
    tokens_per_second: float | None
    remaining_seconds: float | None
    idle_seconds: float | None
    log: str | None
    metrics_problem: str | None = None
    training: bool = True
    stopped: str | None = None


def read_status(run_dir: Path) -> Status:
    """Return the status of the run in a directory.

    Raises:
        InputError: there is no run, or its files are damaged.
    """
    job = read_job(run_dir)
    planned = _planned_steps(run_dir)
    if planned is None and job is None:
        raise InputError(
            run_dir, "no run was started or submitted here", "give the `output` of a run file"
        )
    record = look_up(job.job) if job else JobRecord()
    fields = record.fields
    progress = _progress(run_dir, planned or {})
    idle_seconds = _seconds_since_change(run_dir / METRICS_FILE)
    job_state = fields.get("JobState")
    training = not progress.done and is_trained(
        run_dir, job_state, idle_seconds, _median(progress.training, "step_seconds")
    )
    waits = job_state is not None and job_state not in OVER
    is_over = planned is not None and not (training or waits or progress.done)
    return Status(
        run=str(run_dir),
        job=job.job if job else None,
        state=fields.get("JobState", record.unknown),
        reason=_known_value(fields.get("Reason")),
        nodes=_known_value(fields.get("NodeList")),
        excluded=_known_value(fields.get("ExcNodeList")),
        restarts=int(fields["Restarts"]) if "Restarts" in fields else None,
        phase=progress.phase,
        step=progress.step,
        steps=progress.steps if planned else None,
        done=progress.done,
        loss=_number(progress.training[-1], "loss") if progress.training else None,
        divergence=progress.divergence,
        tokens_per_second=_median(progress.training, "tokens_per_second"),
        remaining_seconds=progress.remaining_seconds if training or progress.done else None,
        idle_seconds=idle_seconds,
        log=job.log if job else None,
        metrics_problem=metrics_problem(run_dir),
        training=training,
        stopped=_why_stopped(progress, _end_after(run_dir)) if is_over else None,
    )


def _why_stopped(progress: _RunProgress, end_after: int | None) -> str:
    """Return where and why a run that is not done has stopped; end_after: of its last start."""
    if not progress.training and progress.saved_step is None:
        return "not trained yet"
    if progress.ended_diverged:
        return f"at step {progress.step:,} (it diverged)"
    if progress.has_reached(end_after):
        return (
            f"at step {progress.step:,} (checkpoint.end_after: {end_after:,}): without that key, "
            "the same command resumes from there"
        )
    if progress.stopped is not None and progress.stopped["step"] >= progress.step:
        why = progress.stopped.get("signal", "a signal")  # earlier versions have not recorded it
    else:
        why = "killed, or failed"
    saved = progress.saved_step
    checkpoint = None if saved is None else full_name(saved)
    lost = loss_sentence(checkpoint, progress.step - (progress.before if saved is None else saved))
    return f"at step {progress.step:,} ({why}): {lost}"


def ended_diverged(run_dir: Path) -> bool:
    """Return whether a run has ended because it diverged: if restarted, it would diverge again.

    Steps that are not finite do not count, since a faulty GPU can cause them too.
    """
    progress = _progress(run_dir, {})
    last = progress.last_divergence
    return progress.ended_diverged and last is not None and last["kind"] != "not_finite"


def has_ended_after(run_dir: Path, end_after: int | None) -> bool:
    """Return whether `checkpoint.end_after` has ended a run before all its phases were done."""
    return _progress(run_dir, _planned_steps(run_dir) or {}).has_reached(end_after)


def _end_after(run_dir: Path) -> int | None:
    """Return `checkpoint.end_after` of a run's last start."""
    try:
        end = read_json(run_dir / RUN_FILE)["checkpoint"]["end_after"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return end if type(end) is int else None


@dataclass(frozen=True)
class _RunProgress:
    """The progress according to the metrics; see Status.

    training: the rows of the last steps. last_divergence: the last event of a divergence. stopped:
    the event of a signal upon which the run saved. before: steps of the runs before it. saved_step:
    step of its newest checkpoint.
    """

    phase: str | None
    step: int
    steps: int
    done: bool
    training: list[dict[str, Any]]
    last_divergence: dict[str, Any] | None
    stopped: dict[str, Any] | None
    before: int
    saved_step: int | None

    def has_reached(self, end_after: int | None) -> bool:
        """Whether the run has saved after this step, and is not done."""
        if end_after is None or self.saved_step is None or self.done:
            return False
        return self.saved_step >= end_after

    @property
    def ended_diverged(self) -> bool:
        row = self.last_divergence
        return row is not None and row["event"] == "divergence_stop" and row["step"] >= self.step

    @property
    def divergence(self) -> str | None:
        row = self.last_divergence
        if row is None or row["event"] == "divergence_over":
            return None
        where = f"step {row['step']:,} ({row['kind']})"
        return f"the run has ended at {where}" if self.ended_diverged else f"since {where}"

    @property
    def remaining_seconds(self) -> float | None:
        if self.done:
            return 0.0
        seconds = _median(self.training, "step_seconds")
        if seconds is None or self.ended_diverged:
            return None
        return seconds * max(0, self.steps - self.step)


def _progress(run_dir: Path, planned: Mapping[str, int]) -> _RunProgress:
    """Derive it from the planned steps of every phase and the history of the run."""
    metrics, before = run_dir / METRICS_FILE, read_origin(run_dir).step
    rows, saved = last_rows(metrics), newest_state(run_dir) or {}
    ends = read_history(run_dir).ends()
    steps = before
    for name, length in planned.items():
        steps = ends.get(name, steps + length)
    step = max((row["step"] for row in rows), default=before)
    phase: str | None = next((row["phase"] for row in reversed(rows) if "phase" in row), None)
    if saved.get("step", 0) > step or phase is None:  # the metrics were truncated or lost
        step, phase = max(step, saved.get("step", before)), saved.get("phase_name", phase)
    return _RunProgress(
        phase=phase,
        step=step,
        steps=steps,
        done=bool(planned) and list(planned)[-1] in ends,
        training=[row for row in rows if "step_seconds" in row][-_RECENT_STEPS:],
        last_divergence=next((row for row in reversed(rows) if _is_of_divergence(row)), None),
        stopped=next((row for row in reversed(rows) if row.get("event") == "stopped"), None),
        before=before,
        saved_step=saved.get("step"),
    )


def status_as_json(status: Status) -> dict[str, Any]:
    """Return the status as plain data."""
    return asdict(status)


def as_text(status: Status) -> str:
    """Return the status as text, with one line for each known value."""
    return "".join(f"{name:<10} {value}\n" for name, value in _lines(status))


def _lines(status: Status) -> Iterator[tuple[str, str]]:
    yield "run", status.run
    if status.job is not None:
        yield "job", _job_sentence(status)
        yield "restarts", "?" if status.restarts is None else f"{status.restarts}"
    yield "phase", status.phase or "none yet"
    planned = f" of {status.steps:,} ({status.step / status.steps:.1%})" if status.steps else ""
    yield "step", f"{status.step:,}{planned}"
    if status.loss is not None:
        yield "loss", f"{status.loss:.4f}"
    if status.divergence is not None:
        yield "divergence", status.divergence
    if status.tokens_per_second is not None:
        yield "speed", f"{status.tokens_per_second:,.0f} tokens/s"
    if status.stopped is not None:
        yield "stopped", status.stopped
    if status.done:
        yield "remaining", "nothing: all phases are done"
    elif status.remaining_seconds is not None:
        yield "remaining", f"{_duration(status.remaining_seconds)} of training"
    if status.idle_seconds is not None:
        yield "last sign", f"{_duration(status.idle_seconds)} ago"
    if status.metrics_problem is not None:
        yield "metrics", status.metrics_problem
    if status.log is not None:
        yield "log", status.log


def _job_sentence(status: Status) -> str:
    why = f" ({status.reason})" if status.reason else ""
    nodes = f" on {status.nodes}" if status.nodes else ""
    excluded = f", not on {status.excluded}" if status.excluded else ""
    return f"{status.job}: {status.state}{why}{nodes}{excluded}"


def _planned_steps(run_dir: Path) -> dict[str, int] | None:
    """Return the planned steps of every phase; None before the run has started."""
    path = run_dir / PLAN_FILE
    try:
        return {phase["name"]: phase["steps"] for phase in read_hashed_json(path)["phases"]}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(path, "is damaged", "restore it") from None


def _is_of_divergence(row: Mapping[str, Any]) -> bool:
    """Return whether a row reports that training diverges, ended by that, or no longer does."""
    return str(row.get("event", "")).startswith("divergence")


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    numbers = [each for row in rows if (each := _number(row, key)) is not None]
    return statistics.median(numbers) if numbers else None


def _number(row: Mapping[str, Any], key: str) -> float | None:
    """A row's number; None where it is damaged."""
    value = row.get(key)
    return value if isinstance(value, int | float) else None


def _seconds_since_change(path: Path) -> float | None:
    if not path.exists():
        return None
    return max(0.0, datetime.now().timestamp() - path.stat().st_mtime)


def _known_value(value: str | None) -> str | None:
    return None if value in (None, "", "None", "(null)") else value


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{days:.1f} days"
    if hours >= 2:
        return f"{hours:.1f} hours"
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{seconds:.0f} seconds"
