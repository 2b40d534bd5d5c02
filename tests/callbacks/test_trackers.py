"""A tracker is a class and its config class: it gets all rows and events of a run."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from callback_support import step_record
from data_support import wait_until
from run_support import make_corpora, read_rows, run_settings, timeless, write_run_file
from warm_commands import run_killed, run_well

from megaphase.callbacks.callback import Callback, CallbackList, HeldOutLoss, ValidationRecord
from megaphase.callbacks.config import LoggingConfig
from megaphase.callbacks.trackers import feed
from megaphase.callbacks.trackers.tracker import (
    Opened,
    Position,
    Record,
    TrackedRun,
    Tracker,
    TrackerConfig,
)
from megaphase.callbacks.trackers.wandb_tracker import WandbConfig
from megaphase.config.fields import FilePath
from megaphase.config.load import load_run_file
from megaphase.config.run import RunConfig
from megaphase.training.run_directory import RunDirectory
from megaphase.training.tracker_check import check_trackers
from megaphase.training.trainer import Trainer
from megaphase.utils.errors import InputError


class ToyTracker(Tracker):
    """Appends rows and the position after them to a text file, which it reads at a later start."""

    def __init__(self, path: Path, run: TrackedRun) -> None:
        self._path, self._run = path, run

    def open(self) -> Opened:
        known = toy_lines(self._path) if self._run.id == "toy" else []
        position = Position(*known[-1]["position"]) if known else None
        return Opened("toy", position, f"recorded in {self._path}")

    def write(self, records: Sequence[Record]) -> int:
        with self._path.open("a") as file:
            for record in records:
                file.write(json.dumps({"row": record.row, "position": record.position}) + "\n")
        return len(records)

    def close(self, error: BaseException | None) -> None:
        self._path.with_suffix(".end").write_text(f"ended with {error}")


class ToyConfig(TrackerConfig):
    """file: where the rows are recorded. fault: what the tracker does wrong."""

    file: FilePath
    fault: Literal["raises", "hangs"] | None = None

    def build(self, run: TrackedRun) -> Tracker:
        faulty = {None: ToyTracker, "raises": RaisingTracker, "hangs": HangingTracker}
        return faulty[self.fault](self.file, run)


class RaisingTracker(ToyTracker):
    """Takes no record."""

    def write(self, records: Sequence[Record]) -> int:
        raise ConnectionError("no route to the host")


class HangingTracker(ToyTracker):
    """Never returns from its first record."""

    def write(self, records: Sequence[Record]) -> int:
        threading.Event().wait()
        raise AssertionError


class ToyLogging(LoggingConfig):
    """The section `logging` with more fields, as a new tracker adds one."""

    toy: ToyConfig | None = None
    other: ToyConfig | None = None


def add_toy() -> None:
    """In a run's process: register the toy tracker in its run file."""
    feed.PAUSE_SECONDS = 0.0
    RunConfig.model_fields["logging"].annotation = ToyLogging
    RunConfig.model_fields["logging"].default = ToyLogging()
    RunConfig.model_rebuild(force=True)


def add_toy_and_wait(path: Path) -> None:
    """Likewise; the tracker then has step 6 before a kill ahead of step 7."""
    add_toy()
    train_step = Trainer.train_step

    def wait_and_train(trainer: Trainer, *arguments: Any) -> None:
        if trainer.state.step == 6:
            wait_until(lambda: toy_lines(path)[-1]["row"]["step"] == 6)
        train_step(trainer, *arguments)

    Trainer.train_step = wait_and_train  # type: ignore[method-assign]


def toy_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def toy_settings(corpora: Path, **trackers: Any) -> dict[str, Any]:
    logging = {"every_steps": 5, "tensorboard": False} | trackers
    checkpoint = {"every_steps": 4, "asynchronous": False}
    return run_settings(corpora, logging=logging, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def run_file(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run file of a run that was killed in its first phase, and then run to its end."""
    folder = tmp_path_factory.mktemp("tracked")
    path = write_run_file(folder, toy_settings(corpora, toy={"file": "toy.jsonl"}))
    run_killed(path, before_step=7, prepare=partial(add_toy_and_wait, folder / "toy.jsonl"))
    before = toy_lines(folder / "toy.jsonl")
    assert [line["row"]["step"] for line in before if "loss" in line["row"]] == list(range(1, 7))
    assert "recorded in" in run_well("train", path, prepare=add_toy)
    return path


def test_a_run_that_was_killed_and_resumed_is_one_run_at_the_tracker(run_file: Path) -> None:
    """Steps 5 and 6, which are trained again after the checkpoint of step 4, are there once."""
    found = [line["row"] for line in toy_lines(run_file.parent / "toy.jsonl")]
    expected = read_rows(run_file.parent / "run")
    assert timeless(found) == timeless(expected)
    assert [row["step"] for row in found if row.get("event") == "resume"] == [4]
    assert {row["event"] for row in found if "event" in row} >= {
        "phase_start", "phase_end", "optimizer_reset", "checkpoint", "resume",
    }  # fmt: skip
    assert (run_file.parent / "toy.end").read_text() == "ended with None"
    known = json.loads((run_file.parent / "run" / "trackers" / "toy.json").read_text())
    assert known == {"id": "toy", "target": {}}


def test_trackers_that_raise_and_hang_do_not_change_a_run(
    run_file: Path, corpora: Path, tmp_path: Path
) -> None:
    toy = {"file": "toy.jsonl", "fault": "raises"}
    other = {"file": "other.jsonl", "fault": "hangs", "wait_seconds": 0.25}
    path = write_run_file(tmp_path, toy_settings(corpora, toy=toy, other=other))
    said = " ".join(run_well("train", path, prepare=add_toy).split())
    rows = read_rows(tmp_path / "run")
    assert timeless(rows) == timeless(read_rows(run_file.parent / "run"))
    failed = "ConnectionError: no route to the host"
    assert f"Warning: toy fails and is tried again; training is not affected: {failed}" in said
    assert f"Warning: other: {len(rows)} of {len(rows)} records were dropped: it had not" in said
    dropped = re.search(r"Warning: toy: (\d+) of (\d+) records were dropped: (\w+)", said)
    assert dropped is not None
    assert dropped[1] == dropped[2] == str(len(rows))
    assert dropped[3] == "ConnectionError"
    assert not (tmp_path / "toy.jsonl").exists()

    # The run is done: what they lack is tried again.
    again = " ".join(run_well("train", path, prepare=add_toy).split())
    assert f"Warning: toy: {len(rows)} of {len(rows)} records were dropped: Conn" in again
    assert f"Warning: other: {len(rows)} of {len(rows)} records were dropped: it had not" in again
    del toy["fault"]
    write_run_file(tmp_path, toy_settings(corpora, toy=toy, other=other))
    said = run_well("train", path, prepare=add_toy)
    assert "nothing to do" in said
    assert "Warning: toy" not in said
    found = [line["row"] for line in toy_lines(tmp_path / "toy.jsonl")]
    assert timeless(found) == timeless(rows)
    assert read_rows(tmp_path / "run") == rows


def test_a_run_file_without_the_tracker_is_not_tracked(run_file: Path) -> None:
    config = load_run_file(run_file, ("logging={every_steps: 5}",))
    assert list(config.logging.trackers()) == []
    toy = ToyConfig(file=run_file.parent / "other.jsonl")
    assert list(ToyLogging(toy=toy).trackers()) == [("toy", toy)]


def test_a_tracker_whose_package_is_missing_is_refused(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run_file(run_file, ("logging={wandb: {project: languages}}",))
    check_trackers(config)
    monkeypatch.setattr(WandbConfig, "PACKAGE", "no_such_package")
    with pytest.raises(InputError) as refused:
        check_trackers(config)
    assert str(refused.value) == (
        f"{run_file}: logging.wandb: needs the package no_such_package, which is not installed; "
        'pip install "megaphase[no_such_package]"'
    )


@pytest.mark.parametrize("name", ["trackers", "trackers/wandb"])
def test_a_file_in_place_of_a_trackers_folder_is_refused(
    run_file: Path, tmp_path: Path, name: str
) -> None:
    overrides = ("logging={wandb: {project: languages}}", f"output={tmp_path}")
    config = load_run_file(run_file, overrides)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(InputError) as refused:
        RunDirectory(tmp_path).claim(config, {})
    assert str(refused.value) == (
        f"{path}: is no folder, which logging.wandb needs; move it away, or leave out logging.wandb"
    )


def test_a_store_to_which_mlflow_does_not_write_is_refused(run_file: Path) -> None:
    mlflow = "logging={mlflow: {experiment: languages, tracking_uri: mlruns}}"
    with pytest.raises(InputError) as refused:
        check_trackers(load_run_file(run_file, (mlflow,)))
    assert str(refused.value) == (
        f"{run_file}: logging.mlflow.tracking_uri: mlruns is a folder, to which MLflow does not "
        "write any more; give a server or sqlite:////data/mlflow.db"
    )


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
