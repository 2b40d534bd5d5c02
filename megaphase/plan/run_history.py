"""A run's history beyond its plan: its origin, the ends of its phases, and the skipped steps.

Every checkpoint stores it, so that it does not depend on a `metrics.jsonl` that may be truncated or
lost. The metrics are only read for events since the newest checkpoint, and for runs whose
checkpoints were written by an earlier version, without the history.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from megaphase.checkpoint.names import newest_state, permanent_ends
from megaphase.plan.origin import RunOrigin, read_origin
from megaphase.plan.plan import Plan
from megaphase.plan.position import StreamPosition
from megaphase.utils.errors import InputError
from megaphase.utils.metrics_rows import (
    Row,
    Steps,
    is_training,
    last_rows,
    read_lines,
    steps_in_words,
)
from megaphase.utils.run_files import METRICS_FILE
from megaphase.utils.spike_words import spike_in_words

_EVENTS = (b'"phase_end"', b'"phase_start"', b'"step_skipped"', b'"spike_skipped"')


@dataclass
class PhaseHistory:
    """The history of a phase; steps count over the whole run and the runs from which it branched.

    Attributes:
        begun_after: steps done before the phase.
        starts: samples of each task used before the phase; None if only the metrics record it.
        ended_after: steps done at its end; None if it has not ended, or that is not known.
        reason: why it ended.
    """

    name: str
    begun_after: int | None = None
    starts: dict[str, int] | None = None
    ended_after: int | None = None
    reason: str | None = None


@dataclass
class RunHistory:
    """The history of a run.

    Attributes:
        origin: where a branch began, as in its `origin.json`; None for other runs.
        phases: the phases that have begun, in order.
        skipped: ranges of steps that were skipped because their gradient was not finite.
        spikes: likewise, of steps that were left out as loss spikes.
        doubt: a sentence about what is uncertain, or None.
    """

    origin: RunOrigin | None = None
    phases: list[PhaseHistory] = field(default_factory=list)
    skipped: list[Steps] = field(default_factory=list)
    doubt: str | None = None
    spikes: list[Steps] = field(default_factory=list)

    def phase(self, name: str) -> PhaseHistory:
        """Return the history of this phase, adding it if there is none."""
        found = next((phase for phase in self.phases if phase.name == name), None)
        if found is None:
            found = PhaseHistory(name)
            self.phases.append(found)
        return found

    def ends(self) -> dict[str, int]:
        """The last steps of the phases that have ended."""
        return {p.name: p.ended_after for p in self.phases if p.ended_after is not None}

    def begin_phase(self, name: str, step: int, starts: Mapping[str, int]) -> None:
        """Record that a phase begins after `step` steps; `starts`: samples of each task used by
        then."""
        phase = self.phase(name)
        phase.begun_after, phase.starts = step, dict(starts)

    def end_phase(self, name: str, step: int, reason: str | None) -> None:
        """Record that a phase ends after `step` steps."""
        phase = self.phase(name)
        phase.ended_after, phase.reason = step, reason

    def skip(self, step: int, *, spike: bool = False) -> None:
        """Record that a step was skipped; spike: as a loss spike."""
        ranges = self.spikes if spike else self.skipped
        if ranges and ranges[-1][1] + 1 == step:
            ranges[-1] = (ranges[-1][0], step)
        else:
            ranges.append((step, step))

    def why_skipped(self, step: int) -> str | None:
        """Return why a step was skipped, or None if it was not."""
        if _is_in(self.skipped, step):
            return "its gradient was not finite"
        return "it was a loss spike" if _is_in(self.spikes, step) else None

    def to_json(self) -> dict[str, Any]:
        """Return the history for a checkpoint's state."""
        return {
            "origin": None if self.origin is None else self.origin.to_json(),
            "phases": [asdict(phase) for phase in self.phases],
            "skipped_steps": [list(steps) for steps in self.skipped],
            **({"spikes": [list(steps) for steps in self.spikes]} if self.spikes else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the history from the result of `to_json`.

        Raises KeyError, TypeError or ValueError if it is not one.
        """
        phases = [PhaseHistory(**phase) for phase in value["phases"]]
        skipped, spikes = (
            [(int(first), int(last)) for first, last in ranges]
            for ranges in (value["skipped_steps"], value.get("spikes", []))
        )
        origin = value["origin"]
        began = None if origin is None else RunOrigin.from_json(origin)
        return cls(began, phases, skipped, spikes=spikes)


def _is_in(ranges: Iterable[Steps], step: int) -> bool:
    return any(first <= step <= last for first, last in ranges)


def history_of_state(run_dir: Path, state: Mapping[str, Any]) -> RunHistory:
    """Return the history in a checkpoint of this run; for one of an earlier version, derive it from
    the metrics and the checkpoints at the ends of phases, and set `doubt`."""
    try:
        return RunHistory.from_json(state["history"])
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    history, step = RunHistory(), state["step"]
    _apply_events(history, _events(run_dir, up_to=step))
    for name, end in permanent_ends(run_dir).items():
        if end <= step:
            history.end_phase(name, end, history.phase(name).reason)
    position = state.get("position")
    if position is not None and position.get("phase_step", 0) > 0:
        history.phase(state["phase_name"]).begun_after = step - position["phase_step"]
    history.doubt = (
        f"the checkpoint of step {step:,} was written by an earlier version, which kept no history "
        f"of the run: where phases ended is taken from {METRICS_FILE} and the checkpoints there"
    )
    return history


def read_history(run_dir: Path) -> RunHistory:
    """Return the history of the run in a directory up to now."""
    state = newest_state(run_dir)
    if state is None:
        history = RunHistory()
        _apply_events(history, _events(run_dir))
        return history
    history = history_of_state(run_dir, state)
    _apply_events(history, _events(run_dir, after=state["step"]))
    return history


def steps_done(run_dir: Path) -> int:
    """Return the steps that the run has trained, from its newest checkpoint and its metrics."""
    saved = (newest_state(run_dir) or {}).get("step", 0)
    rows = last_rows(run_dir / METRICS_FILE)
    before = read_origin(run_dir).step
    return max([before, int(saved), *(int(row["step"]) for row in rows if is_training(row))])


def metrics_problem(run_dir: Path) -> str | None:
    """Return what is missing in the run's metrics, compared with its newest checkpoint.

    In words; None if nothing is known to be missing.
    """
    path, state = run_dir / METRICS_FILE, newest_state(run_dir)
    if not path.is_file():
        return None if state is None else f"{METRICS_FILE} is missing"
    size, saved = path.stat().st_size, (state or {}).get("metrics_bytes")
    if type(saved) is int and size < saved:
        return f"{METRICS_FILE} was cut off: {size:,} of at least {saved:,} bytes are there"
    holes: list[Steps] = []
    damaged = False
    for line in read_lines(path, (b'"metrics_damaged"',)):
        if line.row is not None and line.row.get("event") == "metrics_damaged":
            damaged = True
            holes = [(first, last) for first, last in line.row.get("missing_steps", ())]
    if not damaged:
        return None
    if not holes:
        return f"{METRICS_FILE} was altered while the run was stopped"
    return f"the rows of {steps_in_words(holes)} are missing"


class PhaseSpan(NamedTuple):
    """The steps of a phase: after `before` steps of the run it has `steps` steps.

    starts: the positions from which the tasks' streams continue.
    """

    before: int
    steps: int
    starts: list[StreamPosition]


def phase_spans(run_dir: Path, history: RunHistory, plan: Plan, first: int) -> list[PhaseSpan]:
    """Return the steps of every phase: the actual ones if it has ended, else the planned ones.

    first: steps before the run's own.

    Raises:
        InputError: the recorded run does not belong to this plan, or it is not known where a phase
            has ended.
    """
    known = {phase.name: phase for phase in history.phases}
    spans: list[PhaseSpan] = []
    before = first
    for number, phase in enumerate(plan.phases):
        this = known.get(phase.name, PhaseHistory(phase.name))
        following = [known[each.name] for each in plan.phases[number + 1 :] if each.name in known]
        end = this.ended_after
        if end is None and following:
            end = following[0].begun_after
            if end is None or plan.phases[number + 1].name != following[0].name:
                raise InputError(run_dir, f"it is not known at which step {phase.name} ended", "")
        steps = phase.steps if end is None else end - before
        if not 0 <= steps <= phase.steps:
            raise InputError(
                run_dir / METRICS_FILE,
                f"{phase.name} ended with step {end:,} of the run, but by its plan it has the "
                f"{steps_in_words([(before + 1, before + phase.steps)])}",
                "use the run file with which the run began",
            )
        starts = spans[-1].starts if spans else plan.spec.starts
        if spans:
            counts = plan.counts(number - 1, spans[-1].steps)
            if this.starts is not None:
                used = [this.starts[task] for task in plan.tasks]
                counts = np.array(used, np.int64) - [start.samples for start in starts]
            starts = plan.advanced(starts, number - 1, counts)
        spans.append(PhaseSpan(before, steps, starts))
        before += steps
    return spans


def _events(run_dir: Path, *, after: int = -1, up_to: int | None = None) -> Iterable[Row]:
    """Yield the events of the metrics in a range of steps; a killed run may leave half a line."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return
    for line in read_lines(path, _EVENTS):
        row = line.row
        if row is not None and after < row["step"] and (up_to is None or row["step"] <= up_to):
            yield row


def spike_reason(run_dir: Path, step: int) -> str:
    """Return why a step was left out as a loss spike, from its event; empty if it does not say."""
    for row in _events(run_dir, after=step - 1, up_to=step):
        if row.get("event") == "spike_skipped" and isinstance(row.get("exceeded"), dict):
            return spike_in_words(row["exceeded"])
    return ""


def _apply_events(history: RunHistory, events: Iterable[Row]) -> None:
    for row in events:
        event, step, phase = row.get("event"), row["step"], row.get("phase")
        if event in ("step_skipped", "spike_skipped"):
            history.skip(step, spike=event == "spike_skipped")
        elif isinstance(phase, str) and event == "phase_start":
            history.phase(phase).begun_after = step
        elif isinstance(phase, str) and event == "phase_end":
            history.end_phase(phase, step, row.get("reason"))
