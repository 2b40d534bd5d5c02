"""`megaphase launch slurm` on two nodes: the run is that of one machine, whatever happens to it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from distributed import launch
from run_support import make_corpora, megaphase, read_rows, run_settings, timeless, write_run_file

NODES, TASKS = 2, 2
STEPS = (50, 30)
START_SECONDS = 180.0


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def settings(corpora: Path, **changes: Any) -> dict[str, Any]:
    """Tensor 2 × data 2, ZeRO-3: every tensor-parallel group on one node, every data-parallel one
    on both."""
    found = run_settings(corpora, parallel={"tensor": 2, "zero": 3}, **changes)
    for phase, steps in zip(found["phases"], STEPS, strict=True):
        phase["steps"] = steps
    return found


@pytest.fixture(scope="module")
def undisturbed(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of the run on this machine alone, started as torchrun does."""
    run_file = write_run_file(tmp_path_factory.mktemp("undisturbed"), settings(corpora))
    results = launch(megaphase("train", run_file), NODES * TASKS)
    assert [result.returncode for result in results] == [0] * NODES * TASKS, results[0].stderr
    return timeless(read_rows(run_file.parent / "run"))


def submit(cluster: Cluster, run_file: Path, *options: object) -> str:
    """Submit a run as a user does; the job's id."""
    layout = ["--nodes", NODES, "--gpus-per-node", 0, "--tasks-per-node", TASKS, "--cores", 1]
    command = megaphase("launch", "slurm", run_file, *layout, *options)
    done = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("Submitted: job ")
    return first.split()[-1]
