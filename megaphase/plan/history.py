"""What a run directory tells of a run beside its plan: where it came from, where its phases ended.

A run that goes on from another one's checkpoint has an `origin.json`; `metrics.jsonl` says when a
phase ended before its length was reached.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megaphase.errors import InputError
from megaphase.files import read_json
from megaphase.plan.plan import Plan
from megaphase.run_files import METRICS_FILE, ORIGIN_FILE


class Origin(NamedTuple):
    """Steps of the run before this one, and the samples of each task that it has used."""

    step: int
    used: dict[str, int]


def read_origin(run_dir: Path) -> Origin:
    """What this run goes on from: nothing where it is a run of its own, or none yet.

    Raises:
        InputError: the file is damaged.
    """
    path = run_dir / ORIGIN_FILE
    try:
        origin = read_json(path)
        return Origin(int(origin["step"]), {task: int(n) for task, n in origin["used"].items()})
    except FileNotFoundError:
        return Origin(0, {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            path, "is damaged or cannot be read", "restore it or branch into another output"
        ) from None


def real_steps(run_dir: Path, plan: Plan, origin: Origin) -> list[int]:
    """The steps of every phase: those that it had where it has ended, else the planned ones.

    Raises:
        InputError: the run that is recorded there is not one of this plan.
    """
    ends = dict(phase_ends(run_dir / METRICS_FILE))
    steps, before = [], origin.step
    for phase in plan.phases:
        steps.append(ends.get(phase.name, before + phase.steps) - before)
        if not 0 <= steps[-1] <= phase.steps:
            raise InputError(
                run_dir / METRICS_FILE,
                f"{phase.name} ended with step {ends[phase.name]:,} of the run, but by its plan it "
                f"has the steps {before + 1:,} to {before + phase.steps:,}",
                "use the run file with which the run began",
            )
        before += steps[-1]
    return steps


def phase_ends(metrics: Path) -> Iterator[tuple[str, int]]:
    """(phase, its last step, counted over the run) of every phase that has ended."""
    if not metrics.exists():
        return
    with open(metrics, "rb") as lines:
        for line in lines:
            # A run that is killed may leave half a line.
            if b'"phase_end"' in line and line.endswith(b"\n"):
                row = json.loads(line)
                if row.get("event") == "phase_end":
                    yield row["phase"], row["step"]
