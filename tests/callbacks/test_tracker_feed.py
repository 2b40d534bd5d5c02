"""What a tracker gets: every row once, whatever fails, and a count of those that it did not."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from data_support import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from tracked_run import FIRST, train

from megaphase.callbacks.trackers import feed
from megaphase.callbacks.trackers.known_run import KnownRun
from megaphase.callbacks.trackers.metric_names import metrics
from megaphase.callbacks.trackers.tracker import (
    Opened,
    Position,
    Record,
    TrackedRun,
    Tracker,
    TrackerConfig,
)
from megaphase.callbacks.trackers.unrecorded import UnrecordedRows


class Service:
    """Where the trackers of a test record: it survives them, and can be told to fail.

    Attributes:
        faults: how many of the next calls fail, by method; most: records taken at once.
        down: steps whose records it never takes.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.faults = {"open": 0, "write": 0, "close": 0}
        self.most = 3
        self.down: set[int] = set()
        self.hang = threading.Event()
        self.hang.set()
        self.runs: list[TrackedRun] = []
        self.ended: list[BaseException | None] = []
        self.abandoned = False

    def call(self, method: str) -> None:
        self.hang.wait()
        if self.faults[method] > 0:
            self.faults[method] -= 1
            raise ConnectionError(f"{method} failed")

    @property
    def rows(self) -> list[dict[str, object]]:
        return [record.row for record in self.records]


class ServiceTracker(Tracker):
    def __init__(self, service: Service, run: TrackedRun) -> None:
        self._service, self._run = service, run

    def open(self) -> Opened:
        self._service.call("open")
        self._service.runs.append(self._run)
        known = self._service.records
        position = known[-1].position if known and self._run.id is not None else None
        return Opened("the run", position, "somewhere")

    def write(self, records: Sequence[Record]) -> int:
        self._service.call("write")
        if records[0].step in self._service.down:
            raise ValueError("never\nthis one")
        taken = records[: self._service.most]
        taken = [each for each in taken if each.step not in self._service.down]
        self._service.records += taken
        return len(taken)

    def close(self, error: BaseException | None) -> None:
        self._service.call("close")
        self._service.ended.append(error)

    def abandon(self) -> None:
        self._service.abandoned = True


class ServiceConfig(TrackerConfig):
    """A tracker of the service that the class has."""

    def build(self, run: TrackedRun) -> ServiceTracker:
        return ServiceTracker(SERVICES[-1], run)


SERVICES: list[Service] = []


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(feed, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(feed, "RETRY_SECONDS", (0.0, 0.0))
    SERVICES.append(Service())
    return SERVICES[-1]


TRACKERS: dict[str, TrackerConfig] = {"service": ServiceConfig()}


def all_rows(folder: Path) -> list[dict[str, object]]:
    """The rows of metrics.jsonl, as the tracker reads them."""
    path = folder / "metrics.jsonl"
    return [record.row for record in UnrecordedRows(path, None, 0).next(10_000)]


def test_a_tracker_gets_every_row_in_order(service: Service, tmp_path: Path) -> None:
    _, said = train(tmp_path / "run", TRACKERS)
    assert service.rows == all_rows(tmp_path / "run")
    assert len(service.rows) == 8 + 6 + 2 + 4 + 2 + 1
    assert service.ended == [None]
    assert said == ["service: somewhere"]


@pytest.mark.parametrize("until", [3, 4, 5, 7])
def test_what_is_trained_again_is_recorded_once(
    service: Service, tmp_path: Path, until: int
) -> None:
    """Killed with and without rows after the checkpoint, also at the switch."""
    run = tmp_path / "run"
    rows = run / "metrics.jsonl"

    def everything_is_recorded() -> bool:
        return len(service.records) == rows.read_bytes().count(b"\n")

    state, _ = train(
        run,
        TRACKERS,
        until=until,
        is_killed=True,
        before_end=lambda: wait_until(everything_is_recorded),
    )
    train(run, TRACKERS, state=state)
    resumed = [row for row in service.rows if row.get("event") == "resume"]
    assert [row["step"] for row in resumed] == [until // 2 * 2]
    found = [row for row in service.rows if row.get("event") != "resume"]
    assert found == [row for row in all_rows(run) if row.get("event") != "resume"]
    assert [run.id for run in service.runs] == [None, "the run"]


def test_a_tracker_that_is_added_later_gets_the_run_from_its_start(
    service: Service, tmp_path: Path
) -> None:
    state, _ = train(tmp_path / "run", {}, until=5, is_killed=True)
    train(tmp_path / "run", TRACKERS, state=state)
    assert service.rows == all_rows(tmp_path / "run")


def test_rows_that_a_killed_tracker_lost_are_recorded_at_the_next_start(
    service: Service, tmp_path: Path
) -> None:
    state, _ = train(tmp_path / "run", TRACKERS, until=4)
    del service.records[5:]
    train(tmp_path / "run", TRACKERS, state=state)
    assert service.rows == all_rows(tmp_path / "run")


def test_failed_calls_are_repeated(service: Service, tmp_path: Path) -> None:
    service.faults = {"open": 2, "write": 2, "close": 0}

    def recorded() -> None:
        wait_until(lambda: len(service.records) == 2)

    _, said = train(tmp_path / "run", TRACKERS, until=0, before_end=recorded)
    assert len(service.rows) == 2
    assert said == [
        "Warning: service fails and is tried again; training is not affected: "
        "ConnectionError: open failed",
        "service: somewhere",
    ]


def test_a_record_that_is_refused_is_dropped_and_counted(service: Service, tmp_path: Path) -> None:
    service.down = {2}
    run = tmp_path / "run"
    state, _ = train(run, {}, until=4)

    def resumed() -> None:
        wait_until(lambda: any(row.get("event") == "resume" for row in service.rows))

    _, said = train(run, TRACKERS, state=state, until=4, before_end=resumed)
    rows = all_rows(run)
    assert service.rows == [row for row in rows if row["step"] != 2]
    assert said[-1] == (
        f"Warning: service: 3 of {len(rows)} records were dropped: ValueError: never this one; "
        f"{run / 'metrics.jsonl'} has all of them"
    )


def test_what_is_left_at_the_end_is_counted(service: Service, tmp_path: Path) -> None:
    service.faults["close"] = 1
    _, said = train(tmp_path / "run", TRACKERS)
    assert said[1:] == ["Warning: service: ConnectionError: close failed; no record was dropped"]
    service.faults["open"] = 1_000_000
    _, said = train(tmp_path / "other", TRACKERS)
    path = tmp_path / "other" / "metrics.jsonl"
    assert said[-1] == (
        "Warning: service: 23 of 23 records were dropped: ConnectionError: open failed; "
        f"{path} has all of them"
    )


def test_a_tracker_that_hangs_is_left_after_a_bounded_wait(
    service: Service, tmp_path: Path
) -> None:
    service.hang.clear()
    config = ServiceConfig(wait_seconds=0.0)
    _, said = train(tmp_path / "run", {"service": config})
    assert service.abandoned
    path = tmp_path / "run" / "metrics.jsonl"
    assert said == [
        "Warning: service: 23 of 23 records were dropped: it had not ended 0 s after the run; "
        f"{path} has all of them"
    ]
    service.hang.set()


def test_a_branch_knows_the_run_of_its_parent(service: Service, tmp_path: Path) -> None:
    train(tmp_path / "first", TRACKERS, until=FIRST)
    checkpoint = tmp_path / "first" / "checkpoints" / "step-00000004"
    train(tmp_path / "branch", TRACKERS, branched_from=checkpoint)
    assert service.runs[-1].parent == "the run"
    assert service.runs[-1].branched_from == checkpoint
    assert service.runs[-1].id is None


def test_the_id_belongs_to_the_target_and_damage_is_said(tmp_path: Path) -> None:
    known = KnownRun(tmp_path, "service", {"project": "a"})
    said: list[str] = []
    assert known.read(said.append) is None
    known.folder.mkdir(parents=True)
    known.write("17")
    assert known.read(said.append) == "17"
    assert KnownRun(tmp_path, "service", {"project": "b"}).read(said.append) is None
    assert said == []
    path = tmp_path / "trackers" / "service.json"
    path.write_text("{")
    assert known.read(said.append) is None
    assert said == [f"Warning: {path} is damaged: service records the run as a new one"]


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(0, 23), kept=st.integers(0, 23))
def test_after_any_position_the_rest_of_the_rows_follows(
    tmp_path_factory: pytest.TempPathFactory, cut: int, kept: int
) -> None:
    run = tmp_path_factory.getbasetemp() / "positions"
    if not run.exists():
        train(run, {})
    path = run / "metrics.jsonl"
    records = UnrecordedRows(path, None, 0).next(100)
    position = records[cut - 1].position if cut else None
    kept_bytes = records[kept - 1].end if kept else 0
    found = UnrecordedRows(path, position, kept_bytes).next(100)
    assert found == records[cut:]


def test_half_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "event": "a"}\n{"step": 1, "eve')
    rows = UnrecordedRows(path, None, 0)
    assert [record.position for record in rows.next(9)] == [Position(1, 1)]
    assert rows.next(9) == []
    with path.open("a") as file:
        file.write('nt": "b"}\nno row\n')
    assert [record.position for record in rows.next(9)] == [Position(1, 2)]
    assert rows.read == path.stat().st_size


def test_names_hold_task_and_phase() -> None:
    row = {"step": 3, "phase": "joint", "phase_step": 1, "loss": 2.5, "mfu": None}
    assert metrics(row | {"loss_by_task": {"hi": 3.0}, "skipped": True}) == {
        "train/loss/joint": 2.5, "train_loss/hi/joint": 3.0, "train/skipped/joint": True,
    }  # fmt: skip
    validation = {"hi": {"loss": 3.0, "gap": None}}
    row = {"step": 3, "phase": "joint", "validation": validation, "validation_average": {"hi": {}}}
    assert metrics(row) == {"validation_loss/hi/joint": 3.0}
    assert metrics({"step": 0, "event": "resume"}) == {"events/resume": 1}
    assert metrics({"step": 0, "event": "best", "phase": "joint"}) == {"events/best/joint": 1}
