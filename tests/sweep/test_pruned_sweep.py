"""`prune: halving` in real sweeps: runs that pause, and kills that change nothing."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_support import wait_until
from run_support import make_corpora, megaphase, read_rows, timeless
from sweep_run_support import run_warm, settings, write
from test_local import running

from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.pareto.report import SweepReport
from megaphase.sweep.start import refuse_failures

STEPS = 16
ARMS = {"static": {"rates": [0.1, 0.3]}, "two-phase": {"pretrain": [0.5], "rates": [0.4]}}
GRID = {"peaks": [1e-4, 1e-2], "warmup": 0.2}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def sweep_file(folder: Path, corpora: Path) -> Path:
    folder.mkdir()
    content = settings(corpora, arms=ARMS, learning_rate=GRID, steps=STEPS, prune="halving")
    return write(folder, content)


@pytest.fixture(scope="module")
def undisturbed(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepDirectory:
    path = sweep_file(tmp_path_factory.mktemp("pruned") / "sweep", corpora)
    sweep, directory, outcomes = run_warm(path)
    refuse_failures(sweep, directory, outcomes)
    return directory


def last_step(directory: SweepDirectory, name: str) -> int:
    return max(row["step"] for row in read_rows(directory.run(name)) if "loss" in row)


def test_the_worse_half_ends_at_the_comparison(undisturbed: SweepDirectory) -> None:
    """Of four static settings two are left after step 4, and one after step 8."""
    lasts = {
        name: last_step(undisturbed, name)
        for name in (path.name for path in undisturbed.run("").iterdir())
    }
    static = [last for name, last in lasts.items() if name.startswith("static")]
    assert sorted(static) == [4, 4, 8, STEPS]
    assert sorted(last for name, last in lasts.items() if name.startswith("pretrain")) == [2, 8]
    branches = [last for name, last in lasts.items() if name.startswith("two-phase")]
    assert sorted(branches) == [10, STEPS]
    assert set(undisturbed.outcomes()) == {
        name for name, last in lasts.items() if last in (8, STEPS) and not is_pruned(name, last)
    }


def is_pruned(name: str, last: int) -> bool:
    return name.startswith("static") and last == 8


def test_pruned_settings_are_listed_and_counted_as_tried(
    undisturbed: SweepDirectory, tmp_path: Path
) -> None:
    report = SweepReport.of(undisturbed.path)
    sentence = "4 settings, and 1 of first stages, were pruned by their validation losses"
    assert any(sentence in each for each in report.sentences())
    assert not report.view.failures
    (contrast,) = report.view.contrasts
    assert contrast.settings == (2, 4)
    assert contrast.k == 2
    report.write(tmp_path / "report")
    rows = (tmp_path / "report" / "numbers" / "pruned.csv").read_text().splitlines()
    assert len(rows) == 1 + 5
    assert "Pruned settings" in (tmp_path / "report" / "index.html").read_text()


def test_an_ended_sweep_trains_nothing_again(undisturbed: SweepDirectory) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("metrics.jsonl")}
    for file in undisturbed.path.glob("rungs/*"):  # as if killed before they were noted
        file.unlink()
    run_warm(undisturbed.path.parent / "sweep.yaml")
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_kills_change_nothing(undisturbed: SweepDirectory, corpora: Path, tmp_path: Path) -> None:
    """Killed when a run begins, pauses and ends, it makes the same decisions and files."""
    path = sweep_file(tmp_path / "sweep", corpora)
    directory = SweepDirectory(path.parent / "out")
    kill_when(path, directory, lambda: any(directory.run("").glob("*/checkpoints/step-*")))
    kill_when(path, directory, lambda: any(directory.path.glob("rungs/*.json")))
    run_warm(path)
    assert measured(directory) == measured(undisturbed)
    assert written(directory, tmp_path / "a") == written(undisturbed, tmp_path / "b")


def kill_when(path: Path, directory: SweepDirectory, moment: Callable[[], bool]) -> None:
    process = subprocess.Popen(megaphase("sweep", path, "-j", "2"), stdout=subprocess.DEVNULL)
    while not moment():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    wait_until(lambda: not running(directory))


def measured(directory: SweepDirectory) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every run without those that name the directory."""
    return {
        run.name: [row for row in timeless(read_rows(run)) if row.get("event") != "branch"]
        for run in directory.run("").iterdir()
    }


def written(directory: SweepDirectory, out: Path) -> dict[Path, bytes]:
    SweepReport.of(directory.path).write(out)
    files = {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    folder = directory.path / "rungs"
    return files | {Path(file.name): file.read_bytes() for file in folder.iterdir()}
