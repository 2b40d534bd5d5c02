"""A run without a model: it calls callbacks as a run of two phases does, and can be killed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from callback_support import step_record

from megaphase.callbacks.callback import CallbackList, HeldOutLoss, ValidationRecord
from megaphase.callbacks.metrics_file import open_metrics
from megaphase.callbacks.trackers.feed import tracker_feed
from megaphase.callbacks.trackers.tracker import TrackerConfig

FIRST, LAST = 4, 8  # steps of the first phase, and of both
SETTINGS = {"seed": 5, "phases": [{"name": "pretrain", "steps": 4}, {"name": "joint", "steps": 4}]}
TASKS = {"en": "en", "hi": "hi"}
State = dict[str, Any]


def train(
    folder: Path,
    trackers: dict[str, TrackerConfig],
    *,
    state: State | None = None,
    until: int = LAST,
    before_end: Callable[[], object] = lambda: None,
    is_killed: bool = False,
    branched_from: Path | None = None,
    settings: dict[str, Any] = SETTINGS,
    tasks: Mapping[str, str] = TASKS,
) -> tuple[State | None, list[str]]:
    """Train up to a step, from the start or from a checkpoint's state.

    before_end: called after the last step. is_killed: nothing else happens then, as when the
        process is killed. tasks: the names of the tasks en and hi in validations.

    Returns the state of the newest checkpoint, and the sentences for the terminal.
    """
    folder.mkdir(exist_ok=True)
    said: list[str] = []
    callbacks = CallbackList(said.append)
    metrics = folder / "metrics.jsonl"
    callbacks.extend([open_metrics(metrics, state, 1, said.append)])
    feeds = [
        tracker_feed(name, config, metrics, settings, branched_from, said.append)
        for name, config in trackers.items()
    ]
    callbacks.extend(feeds)
    callbacks.__enter__()
    first = 0 if state is None else state["step"]
    if state is not None:
        callbacks.event(first, "resume", checkpoint=f"step-{first}")
    for step in range(first, until + 1):
        phase = "pretrain" if step <= FIRST else "joint"
        if step > first:
            callbacks.on_step_end(step_record(step, phase=phase, loss=10.0 - step))
        if step % 2 == 0 and step > first:
            validate(callbacks, step, phase, tasks)
            if step in (FIRST, LAST):
                callbacks.event(step, "phase_end", phase=phase, reason="its length is reached")
            callbacks.event(step, "checkpoint", phase=phase)
            state = {"step": step, **callbacks.on_save()}
        if step in (0, FIRST):
            phase = "pretrain" if step == 0 else "joint"
            callbacks.event(step, "phase_start", phase=phase)
            if step == FIRST:
                callbacks.event(step, "optimizer_reset", phase=phase)
            validate(callbacks, step, phase, tasks)
    before_end()
    if is_killed:
        for feed in feeds:  # whose threads would read what the next start writes
            feed._rows.path = Path(os.devnull)
    else:
        callbacks.__exit__(None, None, None)
    return state, said


def validate(callbacks: CallbackList, step: int, phase: str, tasks: Mapping[str, str]) -> None:
    en, hi = tasks["en"], tasks["hi"]
    losses = {en: HeldOutLoss(1.5 + step, 0.5), hi: HeldOutLoss(2.5 + step, 0.75)}
    gaps = {en: None, hi: 0.125}
    callbacks.on_validation_end(ValidationRecord(step, phase, losses, gaps, begins_phase=False))
