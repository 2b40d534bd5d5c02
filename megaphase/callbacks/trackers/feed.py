"""Feeds a tracker with the rows of `metrics.jsonl`, in a thread that training never waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megaphase.callbacks.callback import BenchmarkRecord, Callback, StepRecord, ValidationRecord
from megaphase.callbacks.trackers.known_run import KnownRun
from megaphase.callbacks.trackers.tracker import Record, TrackedRun, Tracker, TrackerConfig
from megaphase.callbacks.trackers.unrecorded import UnrecordedRows
from megaphase.utils.errors import one_line
from megaphase.utils.files import os_errors_named

MOST_RECORDS = 500  # that a tracker gets at once
PAUSE_SECONDS = 1.0  # after a write, so that rows of short steps share a request
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0)  # between tries; after them, a record is dropped
OPEN_RETRY_SECONDS = 60.0  # at most, between tries to open


class TrackerFeed(Callback):
    """The callback of one tracker; exists on rank 0 alone.

    The queue between training and the tracker is metrics.jsonl itself: training writes to it and
    wakes the thread, which reads the rows that the tracker does not have yet. So the queue takes
    no memory, however slow the tracker is, and is still there after a crash.

    Attributes:
        recorded_bytes: how much of metrics.jsonl the tracker has, of what this start wrote.
    """

    def __init__(
        self, name: str, config: TrackerConfig, run: TrackedRun, metrics: Path, known: KnownRun
    ) -> None:
        """
        Args:
            name: the tracker's key in `logging`.
            metrics: the run's metrics.jsonl, cut to what its checkpoint has of it.
            known: where the run's ID at the tracker is stored.
        """
        self._name, self._config, self._tracked, self._known = name, config, run, known
        self._metrics = metrics
        self._kept = self.recorded_bytes = metrics.stat().st_size
        self._rows = UnrecordedRows(metrics, None, self._kept)
        self._seen = self._taken = 0
        self._reason = ""
        self._tracker: Tracker | None = None
        self._error: BaseException | None = None
        self._news, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"tracker-{name}", daemon=True)

    def on_run_begin(self) -> None:
        self._thread.start()

    def on_step_end(self, record: StepRecord) -> None:
        self._news.set()

    def on_validation_end(self, record: ValidationRecord) -> None:
        self._news.set()

    def on_benchmarks_end(self, record: BenchmarkRecord) -> None:
        self._news.set()

    def on_event(self, step: int, event: str, facts: Mapping[str, Any]) -> None:
        self._news.set()

    def on_run_end(self, error: BaseException | None) -> None:
        """Wait for the tracker, but not longer than `wait_seconds`; say what it does not have."""
        self._error = error
        self._ending.set()
        self._news.set()
        self._thread.join(self._config.wait_seconds)
        reason = self._reason
        if self._thread.is_alive():
            reason = f"it had not ended {self._config.wait_seconds:g} s after the run"
            if self._tracker is not None:
                self._tracker.abandon()
        unread = _lines_after(self._metrics, max(self._rows.read, self._kept))
        dropped = self._seen - self._taken + unread
        if dropped:
            self.run.say(
                f"Warning: {self._name}: {dropped:,} of {self._taken + dropped:,} records were "
                f"dropped: {reason}; {self._metrics} has all of them"
            )
        elif reason and self._rows.read < self._kept:
            later = "what it lacks is recorded when the run is started again"
            self.run.say(f"Warning: {self._name}: {reason}; {later}")
        elif reason:
            self.run.say(f"Warning: {self._name}: {reason}; no record was dropped")

    def _main(self) -> None:
        """The thread: nothing that the tracker raises leaves it."""
        try:
            tracker = self._open()
            if tracker is None:
                return
            while self._write_next(tracker):
                pass
            if self._seen == self._taken:
                self._reason = ""
            tracker.close(self._error)
        except BaseException as error:
            self._fails(error)

    def _open(self) -> Tracker | None:
        """Open the tracker; None if the run ends before that succeeds."""
        wait = RETRY_SECONDS[0]
        while True:
            try:
                self._tracker = tracker = self._config.build(self._tracked)
                opened = tracker.open()
                break
            except Exception as error:
                self._fails(error)
            if self._ending.wait(wait):
                return None
            wait = min(2 * wait, OPEN_RETRY_SECONDS)
        if opened.id != self._tracked.id:
            self._known.write(opened.id)
        self._rows.recorded = opened.position
        self.run.say(f"{self._name}: {opened.place}")
        return tracker

    def _write_next(self, tracker: Tracker) -> bool:
        """Write the rows that there are, or wait for some; returns whether there may be more."""
        self._news.clear()
        is_ending = self._ending.is_set()  # before the rows are read, so that none is missed
        records = self._rows.next(MOST_RECORDS)
        self._seen += len(records)
        if not records:
            self.recorded_bytes = self._rows.read
            if not is_ending:
                self._news.wait()
            return not is_ending
        while records:
            done = self._write(tracker, records)
            if done is None:
                return False
            self.recorded_bytes = max(self._kept, records[done - 1].end)
            records = records[done:]
        self._ending.wait(PAUSE_SECONDS)
        return True

    def _write(self, tracker: Tracker, records: list[Record]) -> int | None:
        """How many of the records are done; None if the run ends and the tracker fails."""
        for wait in (*RETRY_SECONDS, None):
            try:
                done = tracker.write(records)
                self._taken += done
                return done
            except Exception as error:
                self._fails(error)
            if self._ending.is_set():
                return None
            if wait is not None:
                self._ending.wait(wait)
        return 1  # it is dropped

    def _fails(self, error: BaseException) -> None:
        """Note why the tracker failed; the first time, it is said at once."""
        is_first = not self._reason
        text = one_line(" ".join(str(error).split()))
        self._reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        if is_first and not self._ending.is_set():
            self.run.say(
                f"Warning: {self._name} fails and is tried again; training is not affected: "
                f"{self._reason}"
            )


def tracker_feed(
    name: str,
    config: TrackerConfig,
    metrics: Path,
    settings: Mapping[str, Any],
    branched_from: Path | None,
    say: Callable[[str], None],
) -> TrackerFeed:
    """The feed of one tracker of the run in the folder of `metrics`; see TrackerFeed.

    Args:
        settings: the run file with every default, as in run.json.
        branched_from: the checkpoint's folder, in a branch.
        say: is told of a damaged file.

    Raises:
        RunError: the tracker's folder cannot be made.
    """
    run_dir, target = metrics.parent, config.target()
    known = KnownRun(run_dir, name, target)
    parent = None
    if branched_from is not None:
        parent = KnownRun(branched_from.parent.parent, name, target).read()
    with os_errors_named(known.folder):
        known.folder.mkdir(parents=True, exist_ok=True)
    run = TrackedRun(
        name=run_dir.name,
        folder=known.folder,
        settings=settings,
        id=known.read(say),
        parent=parent,
        branched_from=branched_from,
        wait_seconds=config.wait_seconds,
    )
    return TrackerFeed(name, config, run, metrics, known)


def _lines_after(path: Path, position: int) -> int:
    """How many lines a file has after a position in bytes; 0 if it is not there any more."""
    try:
        with open(path, "rb") as file:
            file.seek(position)
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return 0
