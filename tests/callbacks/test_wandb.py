"""W&B, offline: what its own files hold of a run, read back record by record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tracked_run
from data_support import wait_until
from tracked_run import FIRST, SETTINGS, train

from megaphase.callbacks.trackers import feed
from megaphase.callbacks.trackers.unrecorded import UnrecordedRows
from megaphase.callbacks.trackers.wandb_files import history_rows, last_row, wandb_records
from megaphase.callbacks.trackers.wandb_tracker import WandbConfig, _own_processes

CONFIG = {"wandb": WandbConfig(project="languages", group="seeds", mode="offline")}
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reports of errors to W&B, and no pauses."""
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(feed, "PAUSE_SECONDS", 0.0)


def files(run: Path) -> list[Path]:
    """The .wandb files of a run, in the order of its starts."""
    return sorted(run.glob("trackers/wandb/wandb/offline-run-*/*.wandb"))


def history(run: Path) -> tuple[list[int], Rows]:
    """W&B's numbers of all rows, and the rows without what W&B adds."""
    found = [each for path in files(run) for each in history_rows(path)]
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for _, row in found]
    return [number for number, _ in found], rows


def records(path: Path, kind: str) -> list[Any]:
    return [getattr(r, kind) for r in wandb_records(path) if r.WhichOneof("record_type") == kind]


def is_closed(run: Path) -> bool:
    """Whether W&B's own process, which does it after the run's end, has closed the newest file."""
    return bool(records(files(run)[-1], "exit"))


def described(run: Path) -> tuple[Any, dict[str, Any]]:
    """The description of the run in its newest file, and its config."""
    path = files(run)[-1]
    described = records(path, "run")[-1]
    updates = [u for r in (*[described.config], *records(path, "config")) for u in r.update]
    return described, {u.key or u.nested_key[0]: json.loads(u.value_json) for u in updates}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run whose first start ended after the switch, with rows that the
    second start trains again, and whose newest rows were lost."""
    run = tmp_path_factory.mktemp("wandb") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setattr(feed, "PAUSE_SECONDS", 0.0)
        state, said = train(run, CONFIG, until=5)
        assert state is not None
        folder = run / "trackers" / "wandb" / "wandb"
        assert said == [f"wandb: offline; `wandb sync {folder}/*run-*` uploads it"]
        wait_until(lambda: is_closed(run))
        (path,) = files(run)
        whole = path.read_bytes()
        history_ends = list(history_rows(path))
        path.write_bytes(whole[: len(whole) * 2 // 3])  # as a process that is killed leaves it
        assert 3 < len(list(history_rows(path))) < len(history_ends) - 3
        _, said = train(run, CONFIG, state=state)
        assert len(said) == 1
        wait_until(lambda: is_closed(run))
    return run


def test_two_starts_are_one_run_without_holes_and_repetitions(first: Path) -> None:
    assert len(files(first)) == 2
    runs = [records(path, "run")[-1] for path in files(first)]
    assert runs[0].run_id == runs[1].run_id
    assert all(run.resume for run in runs)
    numbers, rows = history(first)
    assert numbers == list(range(len(numbers)))
    expected = [r.row for r in UnrecordedRows(first / "metrics.jsonl", None, 0).next(1000)]
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert [row.get("event") for row in rows] == [row.get("event") for row in expected]
    losses = {row["step"]: row["loss"] for row in expected if "loss_by_task" in row}
    phase = {step: "pretrain" if step <= FIRST else "joint" for step in losses}
    found = {r["step"]: value for r in rows for k, value in r.items() if k.startswith("train/loss")}
    assert found == losses
    for row in rows:
        if "train/loss/pretrain" in row or "train/loss/joint" in row:
            assert f"train_loss/hi/{phase[row['step']]}" in row
            assert f"train/grad_norm/{phase[row['step']]}" in row
    switch = [row for row in rows if row["step"] == FIRST]
    assert {"validation_loss/hi/pretrain", "validation_gap/hi/joint"} <= {
        k for r in switch for k in r
    }
    reset = next(row for row in rows if row.get("event") == "optimizer_reset")
    assert json.loads(reset["event_facts"]) == {"phase": "joint"}
    assert reset["events/optimizer_reset/joint"] == 1


def test_settings_and_the_axis_of_the_charts(first: Path) -> None:
    run, config = described(first)
    assert (run.project, run.run_group, run.display_name) == ("languages", "seeds", "first")
    assert {key: config[key] for key in SETTINGS} == SETTINGS
    axes = {
        each.glob_name or each.name: each.step_metric for each in records(files(first)[0], "metric")
    }
    assert axes["*"] == "step"
    assert records(files(first)[-1], "exit")[-1].exit_code == 0


def test_a_branch_is_linked_to_its_parent(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And WANDB_MODE decides where the run file does not."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = WandbConfig(project="languages", name="a branch")
    checkpoint = first / "checkpoints" / "step-00000004"
    train(tmp_path / "branch", {"wandb": config}, until=1, branched_from=checkpoint)
    wait_until(lambda: is_closed(tmp_path / "branch"))
    parent = json.loads((first / "trackers" / "wandb.json").read_text())["id"]
    run, settings = described(tmp_path / "branch")
    assert run.run_id != parent
    assert run.display_name == "a branch"
    assert list(run.tags) == [f"parent:{parent}"]
    assert settings["parent"] == {"id": parent, "checkpoint": str(checkpoint)}


def test_without_an_api_key_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    _, said = train(tmp_path / "run", {"wandb": WandbConfig(project="languages")}, until=1)
    assert "no API key: run `wandb login`" in said[-1]
    assert "3 of 3 records were dropped" in said[-1]


def test_disabled_stores_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, said = train(run, {"wandb": WandbConfig(project="languages", mode="disabled")}, until=1)
    assert said == ["wandb: disabled"]
    assert files(run) == []


FROZEN = """
import os, signal, sys
from pathlib import Path
from data_support import wait_until
from tracked_run import train
from megaphase.callbacks.trackers.wandb_tracker import WandbConfig, _own_processes

run = Path(sys.argv[1])

def freeze():
    wait_until(lambda: list(run.glob("trackers/wandb/wandb/offline-run-*/*.wandb")))
    [process] = _own_processes("wandb-core")
    os.kill(process, signal.SIGSTOP)

config = WandbConfig(project="languages", mode="offline", wait_seconds=1.0)
_, said = train(run, {"wandb": config}, before_end=freeze)
print(*said, sep="\\n")
"""


def test_the_process_ends_though_that_of_wandb_is_stopped(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    environment["PYTHONPATH"] = str(Path(tracked_run.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", FROZEN, tmp_path / "run"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "it had not ended 1 s after the run" in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_files_of_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "wandb" / "offline-run-1-abc" / "run-abc.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert last_row(tmp_path, "abc", ("step", "step_row")) is None
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="another format"):
        last_row(tmp_path, "abc", ("step", "step_row"))


def test_only_own_processes_are_ended() -> None:
    assert list(_own_processes("init")) == []
