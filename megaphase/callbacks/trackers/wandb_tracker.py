"""Weights & Biases: a run is one run there, across resumes; offline runs are uploaded later."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

from megaphase.callbacks.trackers.metric_names import event_text, metrics
from megaphase.callbacks.trackers.tracker import (
    Opened,
    Position,
    Record,
    TrackedRun,
    Tracker,
    TrackerConfig,
)
from megaphase.callbacks.trackers.wandb_files import LastRow, last_row
from megaphase.config.fields import Word

# The columns that hold the position of a row, and those of an event.
STEP, STEP_ROW = "step", "step_row"
EVENT, EVENT_FACTS = "event", "event_facts"


class WandbConfig(TrackerConfig):
    """Records the run at Weights & Biases (`pip install "megaphase[wandb]"`), as one run across
    resumes. An online run needs an API key, from `wandb login` or `WANDB_API_KEY`."""

    PACKAGE: ClassVar[str | None] = "wandb"

    project: Word
    """The project; it is made if it does not exist."""
    entity: Word | None = None
    """The user or team; the default one of the API key if left out."""
    name: Word | None = None
    """The run's name; that of the run directory if left out."""
    group: Word | None = None
    """The group of runs that W&B shows it in; none if left out."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Whether the run is uploaded at once; `offline` stores it in `trackers/wandb` of the run
    directory, for `wandb sync`. If left out, `WANDB_MODE` decides, and `online` without it."""

    def target(self) -> dict[str, str | None]:
        return {"entity": self.entity, "project": self.project}

    def build(self, run: TrackedRun) -> WandbTracker:
        return WandbTracker(self, run)


class WandbTracker(Tracker):
    """Writes a history row for every record, with `step` as the axis of all charts.

    W&B's own step counts the rows, so that it grows also where several rows are of one step.
    """

    def __init__(self, config: WandbConfig, run: TrackedRun) -> None:
        self._config, self._tracked = config, run
        self._run: Any = None
        self._next_row = 0

    def open(self) -> Opened:
        import wandb

        mode = self._config.mode or os.environ.get("WANDB_MODE") or "online"
        if mode in ("online", "run") and not wandb.login(prompt=False, verify=False):
            raise RuntimeError(
                "no API key: run `wandb login` or set WANDB_API_KEY, or write mode: offline"
            )
        run_id = self._tracked.id or secrets.token_hex(8)
        if mode == "disabled":
            return Opened(run_id, None, "disabled")
        parent = self._tracked.parent
        self._run = wandb.init(
            dir=str(self._tracked.folder),
            project=self._config.project,
            entity=self._config.entity,
            name=self._config.name or self._tracked.name,
            group=self._config.group,
            mode=mode,  # type: ignore[arg-type]  # WANDB_MODE may be an older word
            id=run_id,
            resume="allow",
            tags=None if parent is None else [f"parent:{parent}"],
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                finish_timeout=max(1.0, 0.8 * self._tracked.wait_seconds),
                stop_fn=_ignore_stop_button,
            ),
        )
        self._run.config.update(self._settings(), allow_val_change=True)
        self._run.define_metric(STEP)
        self._run.define_metric(STEP_ROW, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        if self._run.offline:
            last = last_row(self._tracked.folder, run_id, (STEP, STEP_ROW))
            place = f"offline; `wandb sync {self._tracked.folder}/wandb/*run-*` uploads it"
        else:
            last = self._last_row_online()
            place = str(self._run.url)
        if last is None:
            return Opened(run_id, None, place)
        self._next_row = last.number + 1
        return Opened(run_id, Position(*last.values), place)

    def _settings(self) -> dict[str, Any]:
        """What W&B shows as the run's config."""
        settings = dict(self._tracked.settings)
        if self._tracked.branched_from is not None:
            checkpoint = str(self._tracked.branched_from)
            settings["parent"] = {"id": self._tracked.parent, "checkpoint": checkpoint}
        return settings

    def _last_row_online(self) -> LastRow | None:
        """By the summary of the run at the server."""
        summary = self._run.summary
        values = (summary.get(STEP), summary.get(STEP_ROW))
        if not self._run.resumed or not all(isinstance(value, int | float) for value in values):
            return None
        return LastRow(self._run.step - 1, (int(values[0]), int(values[1])))

    def write(self, records: Sequence[Record]) -> int:
        for record in records if self._run is not None else ():
            step, row = record.position
            values: dict[str, Any] = {STEP: record.step, STEP_ROW: row} | metrics(record.row)
            if record.step < step:  # an event such as `resume`, before steps that are recorded
                values |= {STEP: step, "resumed_step": record.step}
            if record.event is not None:
                values |= {EVENT: record.event, EVENT_FACTS: event_text(record.row)}
            self._run.log(values, step=self._next_row)
            self._next_row += 1
        return len(records)

    def close(self, error: BaseException | None) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)

    def abandon(self) -> None:
        """End W&B's own process, for which Python would otherwise wait at its end."""
        for process in _own_processes("wandb-core"):
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        sys.unraisablehook = _report_unless_of_wandb


def _report_unless_of_wandb(unraisable: sys.UnraisableHookArgs) -> None:
    """At the end of Python, W&B finds that its process has gone; that has been said."""
    if not getattr(unraisable.object, "__module__", "").startswith("wandb."):
        sys.__unraisablehook__(unraisable)


def _ignore_stop_button() -> None:
    """W&B would interrupt the main thread when somebody presses it."""


def _own_processes(name: str) -> Iterator[int]:
    """The children of this process with that name; none where there is no /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):
            before, _, after = stat.read_text().rpartition(")")
            if before.endswith(f"({name}") and int(after.split()[1]) == os.getpid():
                yield int(stat.parent.name)
