"""Checkpoints of a real run are published atomically, whatever goes wrong while it saves.

A run of two processes meets a full disk, a full metrics file and a killed rank, and must end like
its uninterrupted twin. For the store alone see test_store.py.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from distributed import RunningRanks, check, launch
from run_support import (
    copy_run,
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)
from warm_commands import kill_before

from megaphase.checkpoint.state import full_name
from megaphase.utils.locks import exclusive_lock

PROCESSES = 2
RESUMED, FAILING = 12, 16
SHARD_LIMIT, METRICS_LIMIT = 150, 8  # KiB: less than a shard; less than the rows up to FAILING


@dataclass(frozen=True)
class Start:
    """A start of the run that has ended: its ranks' output, and the files it left."""

    results: list[subprocess.CompletedProcess[str]]
    checkpoints: list[str]
    last_row: dict[str, Any]

    @property
    def codes(self) -> list[int]:
        return [result.returncode for result in self.results]

    @property
    def line(self) -> str:
        """The only line on standard error."""
        assert [result.stderr for result in self.results[1:]] == [""] * (PROCESSES - 1)
        (line,) = self.results[0].stderr.splitlines()
        return line


@dataclass(frozen=True)
class Ordeal:
    undisturbed: Path
    run: Path
    disk_full: Start
    metrics_full: Start
    killed: Start
    last: Start


def limited(kilobytes: int, command: list[str]) -> list[str]:
    """Return the command with a limit on the size of files: beyond it a write fails (EFBIG)."""
    return ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", *command]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def undisturbed(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with synchronous saves."""
    folder = tmp_path_factory.mktemp("undisturbed") / "a"
    checkpoint = {"every_steps": 4, "keep": 2, "asynchronous": False}
    changes = {"parallel": {"tensor": 1, "zero": 1}, "checkpoint": checkpoint}
    run_file = write_run_file(folder, run_settings(corpora, **changes))
    check(launch(megaphase("train", run_file), PROCESSES))
    return folder


@pytest.fixture(scope="module")
def ordeal(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Ordeal:
    """Run the same from the end of its first phase on, with asynchronous saves and faults."""
    run_file = copy_run(undisturbed, tmp_path_factory.mktemp("ordeal") / "a")
    run = run_file.parent / "run"
    checkpoints = run / "checkpoints"
    for later in (20, 21):
        shutil.rmtree(checkpoints / full_name(later))
    command = megaphase("train", run_file, "checkpoint.asynchronous=true")

    def start(argv: list[str]) -> Start:
        return ended(launch(argv, PROCESSES))

    def ended(results: list[subprocess.CompletedProcess[str]]) -> Start:
        names = sorted(path.name for path in checkpoints.iterdir())
        return Start(results, names, read_rows(run)[-1] if results[0].returncode == 0 else {})

    def killed_while_saving() -> Start:
        prepare = partial(kill_before, FAILING + 1, rank=1)
        with RunningRanks(command, PROCESSES, prepare=prepare) as ranks:
            return ended(ranks.wait())

    return Ordeal(
        undisturbed,
        run,
        disk_full=start(limited(SHARD_LIMIT, command)),
        metrics_full=start(limited(METRICS_LIMIT, command)),
        killed=killed_while_saving(),
        last=start(command),
    )


@pytest.mark.distributed
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(ordeal: Ordeal) -> None:
    start = ordeal.disk_full
    assert start.codes == [1, 1]
    assert f"{full_name(FAILING)}: rank 0 could not write: File too large" in start.line
    assert f"the same command resumes from {full_name(RESUMED)}" in start.line
    assert start.checkpoints == ["latest", full_name(RESUMED)]


@pytest.mark.distributed
def test_a_disk_that_has_no_room_for_metrics(ordeal: Ordeal) -> None:
    start = ordeal.metrics_full
    assert start.codes == [1, 1]
    metrics = ordeal.run / "metrics.jsonl"
    assert start.line.startswith("megaphase: rank 0 on ")
    assert start.line.endswith(f": {metrics}: cannot be written (File too large)")
    assert start.checkpoints == ["latest", full_name(RESUMED)]


@pytest.mark.distributed
def test_a_rank_that_dies_while_it_saves_is_named(ordeal: Ordeal) -> None:
    start = ordeal.killed
    assert start.codes == [1, -signal.SIGKILL]
    assert "rank 1" in start.results[0].stderr
    assert "has ended without a word" in start.results[0].stderr
    # Whole, by name; that it is whole, every later start has checked.
    assert {name for name in start.checkpoints if name.startswith("step-")} <= {
        full_name(RESUMED), full_name(FAILING),
    }  # fmt: skip


@pytest.mark.distributed
def test_after_all_that_the_run_ends_like_its_twin(ordeal: Ordeal) -> None:
    check(ordeal.last.results)
    assert "resuming from" in ordeal.last.results[0].stdout
    assert "going back" not in ordeal.last.results[0].stdout
    assert timeless(read_rows(ordeal.run)) == timeless(read_rows(ordeal.undisturbed / "run"))
    expected = ["latest", *map(full_name, (RESUMED, 20, 21))]
    assert ordeal.last.checkpoints == expected, "what the dead rank left aside is gone"
    assert (ordeal.run / "checkpoints" / "latest").resolve().name == full_name(21)


@pytest.mark.distributed
def test_asynchronous_and_waiting_saves_write_the_same(ordeal: Ordeal) -> None:
    def manifest(folder: Path) -> dict[str, Any]:
        path = folder / "checkpoints" / full_name(21) / "manifest.json"
        files = json.loads(path.read_text())["files"]
        return {name: files[name] for name in files if name != "state.json"}  # has row sizes

    assert manifest(ordeal.run) == manifest(ordeal.undisturbed / "run")
    for run in (ordeal.run, ordeal.undisturbed / "run"):
        training = {row["step"]: row for row in read_rows(run) if "loss_by_task" in row}
        assert all(0 <= row["save_seconds"] < row["step_seconds"] for row in training.values())
        assert training[FAILING + 1]["save_seconds"] > 0


@pytest.mark.distributed
def test_a_run_directory_has_one_run(undisturbed: Path) -> None:
    def unexpected() -> None:
        raise AssertionError("nobody else trains here")

    record = (undisturbed / "run" / "run.json").read_bytes()
    with exclusive_lock(undisturbed / "run" / ".lock", unexpected):
        command = megaphase("train", undisturbed / "run.yaml", "faults.skip_batches=77")
        results = launch(command, PROCESSES)
    assert [result.returncode for result in results] == [1, 1]
    (line,) = results[0].stderr.splitlines()
    assert "another process is training in this run directory" in line
    assert line.endswith(f"; if there is none, remove {undisturbed / 'run' / '.lock'}")
    assert (undisturbed / "run" / "run.json").read_bytes() == record
    assert results[1].stderr == ""
