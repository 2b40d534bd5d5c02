"""The part of `metrics.jsonl` that belongs to the checkpoint from which a run resumes."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaphase.utils.files import hash_file
from megaphase.utils.metrics_rows import (
    Steps,
    is_training,
    missing_steps,
    read_lines,
    steps_in_words,
)

_SAVED = ("checkpoint", "stopped")  # the events that end the part that a checkpoint keeps


@dataclass(frozen=True)
class KeptMetrics:
    """The part of the file that a resumed run keeps.

    Attributes:
        bytes: how much of the file; the rest was written after the checkpoint, or is half a line.
        problem: how the file has changed since the checkpoint; None if it has not.
        missing: the steps before the checkpoint whose training rows are missing.
        unreadable: how many lines are no rows; they stay as they are.
    """

    bytes: int
    problem: str | None = None
    missing: tuple[Steps, ...] = ()
    unreadable: int = 0

    def sentence(self, path: Path) -> str:
        """For the terminal."""
        lost = f"the rows of {steps_in_words(self.missing)} are missing"
        if not self.missing:
            lost = "no training step is missing"
        if self.unreadable:
            plural = "s" if self.unreadable > 1 else ""
            lost += f", {self.unreadable:,} line{plural} cannot be read"
        return f"Warning: {path} {self.problem}: {lost}; training itself is not affected"

    def event(self) -> dict[str, Any]:
        """The facts of the event `metrics_damaged`."""
        return {
            "problem": self.problem,
            "missing_steps": [list(steps) for steps in self.missing],
            "unreadable_lines": self.unreadable,
        }


def kept_metrics(path: Path, state: Mapping[str, Any], first_step: int) -> KeptMetrics:
    """Compare the file with its size and hash in the checkpoint's state.

    state: of the checkpoint from which the run resumes; those of earlier versions have no hash, so
        that for them the rows are checked for holes and broken lines alone.
    first_step: of the run's own steps.
    """
    size, digest = state["metrics_bytes"], state.get("metrics_hash")
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        problem = "is missing" if not path.exists() else "is not a file"
    elif found < size:
        problem = f"was cut off: it has {found:,} bytes, at the checkpoint it had {size:,}"
    elif digest is not None and hash_file(path, size=size) == digest:
        return KeptMetrics(size)
    else:
        problem = "has been altered since the checkpoint"
    part = _part_before(path, state["step"]) if found is not None else _Part()
    missing = missing_steps(part.steps, first_step, state["step"])
    if digest is None and not missing and not part.unreadable and part.end == size:
        return KeptMetrics(size)
    return KeptMetrics(part.end, problem, tuple(missing), part.unreadable)


@dataclass(frozen=True)
class _Part:
    """The first part of the file; `steps` are those of its training rows."""

    end: int = 0
    steps: Sequence[int] = ()
    unreadable: int = 0


def _part_before(path: Path, step: int) -> _Part:
    """The part that was written up to the checkpoint after `step`.

    Where its event is not there any more, up to the last row of that step or of one before.
    """
    steps, unreadable = array("q"), 0
    end: tuple[int, int, int] = (0, 0, 0)
    saved = None
    for line in read_lines(path):
        if line.row is None:
            unreadable += 1
            continue
        if is_training(line.row):
            steps.append(line.row["step"])
        if line.row["step"] <= step:
            end = line.end, len(steps), unreadable
            if line.row["step"] == step and line.row.get("event") in _SAVED:
                saved = end
    size, count, unreadable = saved or end
    return _Part(size, steps[:count], unreadable)
