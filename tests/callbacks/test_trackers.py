"""A tracker is a class and its config class: it gets all rows and events of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from callback_support import step_record
from run_support import make_corpora, read_rows, run_settings, timeless, write_run_file
from warm_commands import run_killed, run_well

from megaphase.callbacks.callback import Callback, CallbackList, HeldOutLoss, ValidationRecord
from megaphase.callbacks.config import LoggingConfig
from megaphase.callbacks.tracker import Tracker, TrackerConfig
from megaphase.config.fields import FilePath
from megaphase.config.load import load_run_file
from megaphase.config.run import RunConfig


class ToyTracker(Tracker):
    """Appends rows to a text file; after a checkpoint and at the end, a line that says so."""

    def __init__(self, path: Path, resumed_step: int | None) -> None:
        self._file = path.open("a")
        self._write({"opened": resumed_step})

    def write(self, row: dict[str, Any]) -> None:
        self._write(row)

    def on_save(self) -> dict[str, Any]:
        self._write({"flushed": True})
        return {}

    def on_run_end(self, error: BaseException | None) -> None:
        self._write({"closed": error is None})
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


class ToyConfig(TrackerConfig):
    """file: where the rows go."""

    file: FilePath

    def build(self, settings: Mapping[str, Any], resumed_step: int | None) -> ToyTracker:
        return ToyTracker(self.file, resumed_step)


class ToyLogging(LoggingConfig):
    """The section `logging` with one more field, as a new tracker adds it."""

    toy: ToyConfig | None = None


def add_toy() -> None:
    """In a run's process: register the toy tracker in its run file."""
    RunConfig.model_fields["logging"].annotation = ToyLogging
    RunConfig.model_fields["logging"].default = ToyLogging()
    RunConfig.model_rebuild(force=True)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run file of a run that was killed in its first phase, and then run to its end."""
    folder = tmp_path_factory.mktemp("tracked")
    corpora = make_corpora(folder / "corpora")
    logging = {"every_steps": 5, "tensorboard": False, "toy": {"file": "toy.jsonl"}}
    checkpoint = {"every_steps": 4, "asynchronous": False}
    settings = run_settings(corpora, logging=logging, checkpoint=checkpoint)
    path = write_run_file(folder, settings)
    run_killed(path, before_step=7, prepare=add_toy)
    run_well("train", path, prepare=add_toy)
    return path


def test_a_tracker_gets_all_rows_and_events_of_a_run(run_file: Path) -> None:
    lines = [json.loads(line) for line in (run_file.parent / "toy.jsonl").read_text().splitlines()]
    opened = [number for number, line in enumerate(lines) if "opened" in line]
    assert [lines[number]["opened"] for number in opened] == [None, 4]
    assert lines[-1] == {"closed": True}

    def rows(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
        own = ("opened", "flushed", "closed")
        return [line for line in part if not any(key in line for key in own)]

    resumed = rows(lines[opened[1] :])
    expected = read_rows(run_file.parent / "run")
    first = expected.index(resumed[0])
    assert resumed == expected[first:]
    assert resumed[0]["event"] == "resume"
    # Before it was killed: up to the checkpoint, and what a resumed run has trained again.
    killed = timeless(rows(lines[: opened[1]]))
    assert killed[:first] == timeless(expected[:first])
    assert [row["step"] for row in killed if "loss" in row] == list(range(1, 7))
    assert {row["event"] for row in expected if "event" in row} >= {
        "phase_start", "phase_end", "optimizer_reset", "checkpoint", "resume",
    }  # fmt: skip


def test_a_tracker_is_told_of_every_checkpoint(run_file: Path) -> None:
    lines = [json.loads(line) for line in (run_file.parent / "toy.jsonl").read_text().splitlines()]
    before = [lines[number - 1] for number, line in enumerate(lines) if "flushed" in line]
    assert before
    assert all(line.get("event") == "checkpoint" for line in before)


def test_a_run_file_without_the_tracker_is_not_tracked(run_file: Path) -> None:
    config = load_run_file(run_file, ("logging={every_steps: 5}",))
    assert list(config.logging.trackers()) == []
    toy = ToyConfig(file=run_file.parent / "other.jsonl")
    assert list(ToyLogging(toy=toy).trackers()) == [toy]


class Counting(Callback):
    """Records its calls, and has a state."""

    state_key = "counting"

    def __init__(self, calls: list[str], name: str) -> None:
        self._calls, self._name, self.steps = calls, name, 0

    def on_run_begin(self) -> None:
        self._calls.append(f"{self._name} begins")

    def on_step_end(self, record: Any) -> None:
        self.steps += 1
        self._calls.append(f"{self._name} {record.step}")

    def on_run_end(self, error: BaseException | None) -> None:
        self._calls.append(f"{self._name} ends with {error}")
        if self._name == "first":
            raise OSError("no room")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        self.steps = state["steps"]


def test_callbacks_are_called_in_their_order_and_all_of_them_are_closed() -> None:
    calls: list[str] = []
    callbacks = CallbackList(calls.append)
    callbacks.extend([Counting(calls, "first"), Counting(calls, "second")])

    def run() -> None:
        with callbacks:
            callbacks.on_step_end(step_record(1))
            raise ValueError("a fault")

    with pytest.raises(OSError, match="no room"):
        run()
    assert calls == [
        "first begins", "second begins", "first 1", "second 1",
        "first ends with a fault", "second ends with a fault",
    ]  # fmt: skip


def test_a_checkpoint_that_knows_nothing_of_a_callback_leaves_it_as_it_is() -> None:
    callbacks, counting = CallbackList(lambda text: None), Counting([], "only")
    callbacks.extend([counting])
    callbacks.load_state_dict({"step": 7})
    assert counting.steps == 0
    callbacks.load_state_dict({"counting": {"steps": 3}})
    assert callbacks.state_dict() == {"counting": {"steps": 3}}


def test_rows_of_steps_and_validations() -> None:
    assert "skipped" not in step_record(3).row()
    skipped = step_record(3, applied=False, loss=math.nan).row()
    assert skipped["skipped"] is True
    assert list(skipped)[:4] == ["step", "phase", "phase_step", "tokens"]
    losses = {"en": HeldOutLoss(1.5, 0.5), "hi": HeldOutLoss(2.5, 0.75)}
    record = ValidationRecord(4, "only", losses, {"en": None, "hi": 0.125}, begins_phase=False)
    assert record.row() == {
        "step": 4,
        "phase": "only",
        "validation": {
            "en": {"loss": 1.5, "bits_per_byte": 0.5},
            "hi": {"loss": 2.5, "bits_per_byte": 0.75, "gap": 0.125},
        },
    }
