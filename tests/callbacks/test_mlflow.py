"""MLflow, in a database in a file and on its own server: what it has of a run afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_support import wait_until
from remote_support import FaultyProxy
from tracked_run import FIRST, LAST, SETTINGS, train

from megaphase.callbacks.trackers import feed, mlflow_tracker
from megaphase.callbacks.trackers.mlflow_tracker import MLflowConfig
from megaphase.callbacks.trackers.tracker import Position, Record, TrackedRun
from megaphase.launch.local import free_port


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "PAUSE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of MLflow's own server, on this machine."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)
            process.wait()


def found_run(uri: str, run: Path) -> Any:
    from mlflow import MlflowClient

    known = json.loads((run / "trackers" / "mlflow.json").read_text())
    return MlflowClient(uri).get_run(known["id"])


def curve(uri: str, run: Path, name: str) -> list[tuple[int, float]]:
    """All values of a metric with their steps, also those that MLflow has twice."""
    from mlflow import MlflowClient

    run_id = found_run(uri, run).info.run_id
    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, name)]


def check_a_killed_run(uri: str, folder: Path) -> None:
    """A run that is killed after step 7 and resumed from step 6 is one run, with every step once;
    it has its settings, its events, and a branch as its child."""
    from mlflow import MlflowClient

    config = MLflowConfig(experiment="languages", tracking_uri=uri, wait_seconds=120.0)
    run = folder / "first"

    def recorded() -> None:
        file = run / "trackers" / "mlflow.json"
        wait_until(lambda: file.exists() and curve(uri, run, "position/step")[-1:] == [(7, 7.0)])

    state, _ = train(run, {"mlflow": config}, until=7, is_killed=True, before_end=recorded)
    changed = SETTINGS | {"seed": 6, "workers": 2}
    _, said = train(run, {"mlflow": config}, state=state, settings=changed)
    found = found_run(uri, run)
    assert said == [f"mlflow: run {found.info.run_id} of experiment languages at {uri}"]
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert curve(uri, run, "train/loss/pretrain") == [(n, 10.0 - n) for n in range(1, FIRST + 1)]
    assert curve(uri, run, "train/loss/joint") == [
        (n, 10.0 - n) for n in range(FIRST + 1, LAST + 1)
    ]
    validated = [(n, 2.5 + n) for n in (FIRST, 6, LAST)]
    assert curve(uri, run, "validation_loss/hi/joint") == validated
    assert curve(uri, run, "train_loss/en/joint")[0] == (5, 1.5)
    assert curve(uri, run, "events/resume") == [(6, 1.0)]
    data = found.data
    assert {key: data.params[key] for key in ("seed", "workers", "phases/1/name")} == {
        "seed": "5", "workers": "2", "phases/1/name": "joint",
    }  # fmt: skip
    assert data.tags["changed/seed"] == "6"
    assert data.tags["events/optimizer_reset"] == 'step 4: {"phase": "joint"}\n'
    checkpoints = data.tags["events/checkpoint"].splitlines()
    assert [line.split(":")[0] for line in checkpoints] == ["step 8", "step 6", "step 4", "step 2"]

    experiment = MlflowClient(uri).get_experiment(found.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"

    checkpoint = run / "checkpoints" / "step-00000004"
    train(folder / "branch", {"mlflow": config}, until=1, branched_from=checkpoint)
    branch = found_run(uri, folder / "branch").data.tags
    assert branch["mlflow.parentRunId"] == found.info.run_id
    assert branch["megaphase.branched_from"] == str(checkpoint)


@pytest.mark.slow
def test_a_killed_run_in_a_database_in_a_file(database: str, tmp_path: Path) -> None:
    check_a_killed_run(database, tmp_path)


@pytest.mark.slow
def test_a_record_with_more_metrics_than_a_request_takes(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tracker, "MOST_METRICS", 5)
    config = MLflowConfig(experiment="many", tracking_uri=database, wait_seconds=120.0)
    run = tmp_path / "run"
    train(run, {"mlflow": config}, until=2)
    assert curve(database, run, "train/loss/pretrain") == [(1, 9.0), (2, 8.0)]
    assert curve(database, run, "train_loss/hi/pretrain") == [(1, 3.0), (2, 3.0)]
    assert curve(database, run, "position/rows")[-1] == (2, 3.0)


def test_names_that_differ_in_what_mlflow_does_not_allow() -> None:
    named = mlflow_tracker.Names()
    given = ["en", "की", "कि", "a+b", "a:b", "a_b", "क_", "क_u0940_"]
    found = [named(f"train_loss/{name}") for name in given]
    assert found == [
        "train_loss/en", "train_loss/क_", "train_loss/क_u093f_", "train_loss/a_b",
        "train_loss/a_u003a_b", *found[5:],
    ]  # fmt: skip
    assert len(set(found)) == len(given)
    assert [named(f"train_loss/{name}") for name in given] == found
    assert not any(mlflow_tracker._NOT_IN_NAMES.search(name.replace("/", "")) for name in found)


def test_tasks_whose_names_differ_in_a_vowel_sign_have_their_own_curves(
    database: str, tmp_path: Path
) -> None:
    names = {"en": "कि", "hi": "की"}
    settings = SETTINGS | {"tasks": {task: {"corpus": task} for task in names.values()}}
    config = MLflowConfig(experiment="names", tracking_uri=database, wait_seconds=120.0)
    train(tmp_path / "run", {"mlflow": config}, until=2, settings=settings, tasks=names)
    for task, name in (("en", "क_"), ("hi", "क_u0940_")):
        added = {"en": 1.5, "hi": 2.5}[task]
        assert curve(database, tmp_path / "run", f"validation_loss/{name}/pretrain") == [
            (0, added), (2, added + 2),
        ]  # fmt: skip
    params = found_run(database, tmp_path / "run").data.params
    assert (params["tasks/क_/corpus"], params["tasks/क_u0940_/corpus"]) == ("कि", "की")


@pytest.mark.parametrize("uri", ["/data/mlruns", "mlruns", "file:///data/mlruns"])
def test_a_folder_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for config, key in ((MLflowConfig(experiment="e", tracking_uri=uri), ""),
                        (MLflowConfig(experiment="e"), "MLFLOW_TRACKING_URI: ")):  # fmt: skip
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        fault = config.find_fault()
        assert fault is not None
        assert fault.problem == f"{key}{uri} is a folder, to which MLflow does not write any more"
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        assert config.find_fault() is None
        monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for good in (
        "http://tracker:5000",
        "sqlite:////data/mlflow.db",
        "databricks://me",
        "databricks",
    ):
        assert MLflowConfig(experiment="e", tracking_uri=good).find_fault() is None
    assert MLflowConfig(experiment="e").find_fault() is None


def test_a_folder_that_mlflow_would_take_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take `mlruns` by itself, and then refuse it."""
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = MLflowConfig(experiment="e", wait_seconds=120.0)
    assert config.find_fault() is None
    opened = config.build(TrackedRun("run", tmp_path, {})).open()
    assert (tmp_path / "mlflow.db").is_file()
    assert "sqlite:///mlflow.db" in opened.place


def test_a_run_that_the_store_does_not_know_begins_anew(database: str, tmp_path: Path) -> None:
    """As with a database in another folder, or another server in the environment."""
    config = MLflowConfig(experiment="elsewhere", tracking_uri=database)
    first = config.build(TrackedRun("run", tmp_path, {})).open()
    again = config.build(TrackedRun("run", tmp_path, {}, id=first.id)).open()
    assert again.id == first.id
    other = config.build(TrackedRun("run", tmp_path, {}, id="0" * 32)).open()
    assert other.id not in (first.id, "0" * 32)
    assert other.position is None


def test_rows_whose_answer_was_lost_are_recorded_once(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = count(10**18, 10**9)
    monkeypatch.setattr(mlflow_tracker, "time", SimpleNamespace(time_ns=lambda: next(times)))
    run = TrackedRun("run", tmp_path, SETTINGS)
    tracker = MLflowConfig(experiment="again", tracking_uri=database).build(run)
    opened = tracker.open()
    records = [
        Record({"step": n, "phase": "pretrain", "loss": 10.0 - n}, Position(n, 1), n)
        for n in (1, 2)
    ]
    assert tracker.write(records) == tracker.write(records) == 2
    assert tracker.write([Record({"step": 3, "phase": "pretrain", "loss": 7.0}, Position(3, 1), 3)])
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "mlflow.json").write_text(json.dumps({"id": opened.id}))
    assert curve(database, tmp_path, "train/loss/pretrain") == [(1, 9.0), (2, 8.0), (3, 7.0)]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [500, "cut request", "cut answer"])
def test_a_server_that_fails_in_the_middle_of_a_run(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int | str
) -> None:
    """The missing records are named, training continues, and the next start records them."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    wait_until(lambda: is_up(server))
    proxy = FaultyProxy(int(server.rpartition(":")[2]))
    config = MLflowConfig(experiment="faults", tracking_uri=proxy.url, wait_seconds=120.0)
    run = tmp_path / "run"
    state, _ = train(run, {"mlflow": config}, until=FIRST)
    proxy.fail(fault, part="log-batch")
    state, said = train(run, {"mlflow": config}, state=state)
    assert "records were dropped: MlflowException" in said[-1]
    assert said[-1].endswith(f"{run / 'metrics.jsonl'} has all of them")
    proxy.fail(None)
    _, said = train(run, {"mlflow": config}, state=state)
    assert not any("Warning" in text for text in said)
    assert curve(server, run, "train/loss/pretrain") == [(n, 10.0 - n) for n in range(1, FIRST + 1)]
    assert curve(server, run, "train/loss/joint") == [
        (n, 10.0 - n) for n in range(FIRST + 1, LAST + 1)
    ]
    proxy.close()


def is_up(server: str) -> bool:
    try:
        with urllib.request.urlopen(f"{server}/health"):
            return True
    except OSError:
        return False


def test_a_run_that_resumes_in_another_experiment_is_recorded_whole(
    database: str, tmp_path: Path
) -> None:
    first, second = (
        MLflowConfig(experiment=name, tracking_uri=database, wait_seconds=120.0)
        for name in ("one", "another")
    )
    run = tmp_path / "run"
    state, _ = train(run, {"mlflow": first}, until=5)
    id_before = found_run(database, run).info.run_id
    train(run, {"mlflow": second}, state=state)
    assert found_run(database, run).info.run_id != id_before
    assert curve(database, run, "train/loss/pretrain") == [
        (n, 10.0 - n) for n in range(1, FIRST + 1)
    ]
    assert curve(database, run, "train/loss/joint")[-1] == (LAST, 10.0 - LAST)


@pytest.mark.slow
def test_a_killed_run_on_a_server(server: str, tmp_path: Path) -> None:
    """The run begins while the server starts, and the first tries fail."""
    check_a_killed_run(server, tmp_path)


def test_without_a_server_training_ends_and_the_records_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    config = MLflowConfig(experiment="languages", tracking_uri=uri, wait_seconds=120.0)
    _, said = train(tmp_path / "run", {"mlflow": config}, until=1)
    assert "3 of 3 records were dropped: MlflowException" in said[-1]
