"""Where a run stands: what its metrics say, and what Slurm says of its job."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from megaphase.errors import InputError
from megaphase.launch.slurm.submit import read_job
from megaphase.plan.history import METRICS_FILE, read_origin
from megaphase.slurm import job_fields

_TAIL_BYTES = 1 << 18
_RECENT_STEPS = 50


@dataclass(frozen=True)
class Status:
    """What is known of a run; None where something is not.

    Attributes:
        job: the id of the last one that was submitted.
        state: of the job, in Slurm's words; why it waits, or on which nodes it is.
        restarts: of the job.
        phase: whose steps are trained now, or were last.
        step, steps: trained and planned, counted over the whole run; a phase may end early.
        done: whether the last phase has ended.
        loss: of the last step.
        tokens_per_second: the median of the last steps.
        remaining_seconds: of training, at that speed, should no phase end early.
        idle_seconds: since the last row of metrics.
        log: of the job.
    """

    job: str | None
    state: str | None
    reason: str | None
    nodes: str | None
    restarts: int | None
    phase: str | None
    step: int
    steps: int
    done: bool
    loss: float | None
    tokens_per_second: float | None
    remaining_seconds: float | None
    idle_seconds: float | None
    log: str | None


def read_status(run_dir: Path) -> Status:
    """What is known of the run in a directory.

    Raises:
        InputError: there is no run.
    """
    planned = _planned_steps(run_dir)
    steps = sum(planned.values()) + read_origin(run_dir).step
    metrics = run_dir / METRICS_FILE
    rows = list(_last_rows(metrics))
    training = [row for row in rows if "loss" in row][-_RECENT_STEPS:]
    newest = training[-1] if training else {}
    step = max((row["step"] for row in rows), default=read_origin(run_dir).step)
    seconds = statistics.median(row["step_seconds"] for row in training) if training else None
    job = read_job(run_dir)
    fields = job_fields(job.job) if job else {}
    return Status(
        job=job.job if job else None,
        state=fields.get("JobState"),
        reason=_said(fields.get("Reason")),
        nodes=_said(fields.get("NodeList")),
        restarts=int(fields["Restarts"]) if "Restarts" in fields else None,
        phase=newest.get("phase"),
        step=step,
        steps=steps,
        done=any(
            row.get("event") == "phase_end" and row["phase"] == list(planned)[-1] for row in rows
        ),
        loss=newest.get("loss"),
        tokens_per_second=(
            statistics.median(row["tokens_per_second"] for row in training) if training else None
        ),
        remaining_seconds=None if seconds is None else seconds * max(0, steps - step),
        idle_seconds=_seconds_since_change(metrics),
        log=job.log if job else None,
    )


def as_json(status: Status) -> dict[str, Any]:
    """All of it, as plain data."""
    return asdict(status)


def as_table(run_dir: Path, status: Status) -> Table:
    """All of it, for people."""
    table = Table.grid(padding=(0, 2))
    table.add_row("run", str(run_dir))
    if status.job is not None:
        state = status.state or "no longer known to Slurm"
        why = f" ({status.reason})" if status.reason else ""
        nodes = f" on {status.nodes}" if status.nodes else ""
        table.add_row("job", f"{status.job}: {state}{why}{nodes}")
        table.add_row("restarts", "?" if status.restarts is None else f"{status.restarts}")
    table.add_row("phase", status.phase or "none yet")
    share = f" ({status.step / status.steps:.1%})" if status.steps else ""
    table.add_row("step", f"{status.step:,} of {status.steps:,}{share}")
    if status.loss is not None:
        table.add_row("loss", f"{status.loss:.4f}")
    if status.tokens_per_second is not None:
        table.add_row("speed", f"{status.tokens_per_second:,.0f} tokens/s")
    if status.done:
        table.add_row("remaining", "nothing: all phases are done")
    elif status.remaining_seconds is not None:
        table.add_row("remaining", _duration(status.remaining_seconds))
    if status.idle_seconds is not None:
        table.add_row("last sign", f"{_duration(status.idle_seconds)} ago")
    if status.log is not None:
        table.add_row("log", status.log)
    return table


def _planned_steps(run_dir: Path) -> dict[str, int]:
    """Of every phase."""
    path = run_dir / "plan.json"
    try:
        return {phase["name"]: phase["steps"] for phase in json.loads(path.read_text())["phases"]}
    except FileNotFoundError:
        raise InputError(run_dir, "has no plan.json", "give the directory of a run") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(path, "is damaged", "give the directory of a run") from None


def _last_rows(metrics: Path) -> Iterator[dict[str, Any]]:
    """The last rows of a file that may be long, and may end with half of one."""
    if not metrics.exists():
        return
    with open(metrics, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    for line in lines[1 if size > _TAIL_BYTES else 0 : -1]:
        yield json.loads(line)


def _seconds_since_change(path: Path) -> float | None:
    if not path.exists():
        return None
    return max(0.0, datetime.now().timestamp() - path.stat().st_mtime)


def _said(value: str | None) -> str | None:
    return None if value in (None, "", "None", "(null)") else value


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{days:.1f} days"
    if hours >= 2:
        return f"{hours:.1f} hours"
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{seconds:.0f} seconds"
