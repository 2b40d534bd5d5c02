"""Nodes that fail their check are named, and excluded from the next start if requested."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, needs_slurm, start_cluster
from run_support import make_corpora, megaphase, read_rows, run_settings, write_run_file

import megaphase as package

pytestmark = needs_slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with a spare node."""
    with start_cluster(tmp_path_factory.mktemp("slurm"), nodes=("n1", "n2", "n3")) as running:
        yield running


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture
def run_file(corpora: Path, tmp_path: Path) -> Path:
    """Write a run file of two steps."""
    settings = run_settings(corpora)
    settings["phases"] = [{**settings["phases"][0], "steps": 2}]
    return write_run_file(tmp_path / "a run", settings)


def submit(cluster: Cluster, run_file: Path, *options: object) -> str:
    """Submit a job on two nodes; return its id."""
    command = megaphase("launch", "slurm", run_file, "--nodes", 2, "--cores", 1, *options)
    done = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[0].split()[-1]


def cover(cluster: Cluster, node: str, folder: Path) -> None:
    """Let only this node see an empty read-only folder instead of this one.

    A job has the node's root rights and its mount namespace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = f"mount -t tmpfs -o ro none '{folder}'"
    cluster.wait_for(cluster.submit(script, f"--nodelist={node}"), "COMPLETED")


@pytest.fixture
def covered(cluster: Cluster) -> Iterator[list[tuple[str, Path]]]:
    """Yield a list of nodes and folders that are uncovered afterwards."""
    found: list[tuple[str, Path]] = []
    yield found
    for node, folder in found:
        script = f"umount '{folder}'"
        cluster.wait_for(cluster.submit(script, f"--nodelist={node}"), "COMPLETED")


def test_gpus_that_slurm_gave_and_torch_does_not_find(cluster: Cluster, run_file: Path) -> None:
    job = submit(cluster, run_file, "--gpus-per-node", 2)
    assert cluster.wait_for(job, "FAILED")["Restarts"] == "0"
    log = cluster.log_of(job)
    for node in ("n1", "n2"):
        assert f"megaphase: node {node}: torch finds no GPU of 2 (" in log
    last = f"megaphase: job {job}: not started: n1,n2 did not pass the node check, see above"
    assert log.splitlines()[-1] == last
    assert not (run_file.parent / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_without_the_bad_node_it_starts_again(
    cluster: Cluster, run_file: Path, covered: list[tuple[str, Path]]
) -> None:
    covered.append(("n2", run_file.parent / "run"))
    cover(cluster, *covered[0])
    job = submit(cluster, run_file, "--gpus-per-node", 0, "--exclude-bad-nodes")
    cluster.wait_for_log(job, "requeued")
    cluster.hurry(job)
    fields = cluster.wait_for(job, "COMPLETED")
    assert (fields["Restarts"], fields["ExcNodeList"]) == ("1", "n2")
    first, second = cluster.log_of(job).split("requeued, without n2\n")
    assert "on n[1-2]" in first
    output = run_file.parent / "run"
    assert f"megaphase: node n2: {output} cannot be written (Read-only file system)" in first
    assert "on n[1,3]" in second
    assert "all phases are done" in second
    assert len([row for row in read_rows(output) if "loss" in row]) == 2
    shown = subprocess.run(
        megaphase("launch", "status", output, "--json"),
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    status = json.loads(shown.stdout)
    assert status["job"] == job
    assert (status["state"], status["restarts"], status["excluded"]) == ("COMPLETED", 1, "n2")
    assert (status["done"], status["step"], status["steps"]) == (True, 2, 2)


@pytest.mark.slow
def test_nodes_where_the_check_cannot_even_start(
    cluster: Cluster, run_file: Path, covered: list[tuple[str, Path]]
) -> None:
    """Two such nodes of three: the job reports that too few are left, instead of waiting
    forever."""
    for node in ("n2", "n3"):
        covered.append((node, Path(package.__file__).parent))
        cover(cluster, *covered[-1])
    job = submit(cluster, run_file, "--gpus-per-node", 0, "--exclude-bad-nodes")
    cluster.wait_for_log(job, "requeued, without n2")
    cluster.hurry(job)
    assert cluster.wait_for(job, "FAILED")["Restarts"] == "1"
    last = "not requeued: without n3 partition all has 1 of 2 nodes"
    assert cluster.log_of(job).splitlines()[-1] == f"megaphase: job {job}: not started, and {last}"
