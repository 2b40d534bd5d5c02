"""Faults that jobs meet in months, in minutes: time limits, lost nodes, frozen processes."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from data_support import wait_until
from run_support import make_corpora, write_run_file
from train_job_support import (
    LAYOUT,
    NODES,
    TASKS,
    TrainJob,
    launch_slurm,
    rows_of_one_machine,
    settings,
)

from megaphase.launch.slurm.script import template

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def expected(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rows_of_one_machine(tmp_path_factory.mktemp("undisturbed"), corpora)


def time_limit(job: TrainJob) -> str:
    """Five minutes before it the script requests a signal."""
    with job.paused():  # Slurm checks limits every 30 seconds, too late for this run
        job.cluster.run("scontrol", "update", f"JobId={job.job}", "TimeLimit=4")
        wait_until(lambda: _is_to_get(job.process(0), signal.SIGUSR1))
    job.cluster.wait_for(job.job, "PENDING")
    job.cluster.run("scontrol", "update", f"JobId={job.job}", "TimeLimit=60")
    return "megaphase: SIGUSR1 came to rank 0: saved after step "


def _is_to_get(process: int, number: signal.Signals) -> bool:
    """Return whether a signal is pending for a stopped process."""
    status = Path(f"/proc/{process}/status").read_text()
    waiting = re.search(r"^ShdPnd:\t([0-9a-f]+)$", status, re.MULTILINE)
    return waiting is not None and bool(int(waiting[1], 16) & 1 << (number - 1))


def requeue(job: TrainJob) -> str:
    job.cluster.run("scontrol", "requeue", job.job)
    return "DUE TO JOB REQUEUE"


def lose_batch_host(job: TrainJob) -> str:
    return _lose(job, "n1")


def lose_other_host(job: TrainJob) -> str:
    return _lose(job, "n2")


def _lose(job: TrainJob, node: str) -> str:
    job.cluster.kill_node(node)
    job.cluster.down(node)
    job.cluster.wait_for(job.job, "PENDING")
    job.cluster.start_node(node)
    return "start 1 of job"


def freeze(job: TrainJob) -> str:
    _harm(job, signal.SIGSTOP)
    return "gave no sign of life for 10 s, last seen "


def kill(job: TrainJob) -> str:
    _harm(job, signal.SIGKILL)
    return "has ended without a word (killed, or out of memory), last seen "


def _harm(job: TrainJob, number: signal.Signals) -> None:
    """Signal a rank on the second node: the last message of the job names it."""
    os.kill(job.process(2), number)
    job.cluster.wait_for(job.job, "PENDING")
    log = job.cluster.log_of(job.job).splitlines()
    said = [line for line in log if "megaphase: " in line][-2:]
    assert said[0].startswith("n1: megaphase: rank 2 on n2 (process ")
    assert said[1].startswith(f"megaphase: job {job.job}: failed with exit code 137; ")
    assert said[1].endswith("; requeued")


@pytest.mark.parametrize(
    ("silent_seconds", "blows"),
    [(120, (time_limit, requeue)), (10, (kill, freeze, lose_other_host, lose_batch_host))],
)
def test_a_run_survives(
    cluster: Cluster,
    corpora: Path,
    tmp_path: Path,
    expected: list[dict[str, Any]],
    silent_seconds: float,
    blows: tuple[Callable[[TrainJob], str], ...],
) -> None:
    found = settings(corpora, faults={"silent_seconds": silent_seconds})
    job = TrainJob.submitted(cluster, write_run_file(tmp_path, found), "--time", "1:00:00")
    for blow in blows:
        job.train_further()
        said = blow(job)
        assert said in job.start_again()
    assert job.rows_at_the_end() == expected
    assert cluster.job(job.job)["Restarts"] == str(len(blows))


def test_the_script_of_the_repository(
    cluster: Cluster, corpora: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    write_run_file(tmp_path, settings(corpora, checkpoint={"every_steps": 9}))
    (tmp_path / "train.sbatch").write_text(template())
    layout = (f"--nodes={NODES}", f"--ntasks-per-node={TASKS}", "--cpus-per-task=1")
    # As in an activated environment.
    path = f"--export=ALL,PATH={Path(sys.executable).parent}:{os.environ['PATH']}"
    options = ("--parsable", *layout, "--gpus-per-node=0", path)
    arguments = ("train.sbatch", "run.yaml", "checkpoint.every_steps=4")
    job = cluster.run("sbatch", *options, *arguments, folder=tmp_path).strip()
    assert TrainJob(cluster, job, tmp_path / "run").rows_at_the_end() == expected
    logs = sorted(path.name for path in tmp_path.glob("*.log"))
    assert logs == [f"megaphase-{job}{node}.log" for node in ("-n1", "-n2", "")]


def test_a_printed_script_can_be_submitted(
    cluster: Cluster, corpora: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    run_file = write_run_file(tmp_path / "a run", settings(corpora))
    arguments = (run_file, *LAYOUT, "--dry-run")
    done = launch_slurm(run_file.parent, cluster.environment, *arguments)
    assert done.returncode == 0, done.stderr
    assert not cluster.run("squeue", "--noheader")
    (tmp_path / "saved").write_text(done.stdout)
    job = cluster.run("sbatch", "--parsable", "saved", folder=tmp_path).strip()
    run = TrainJob(cluster, job, run_file.parent / "run")
    assert run.rows_at_the_end() == expected
    assert sorted(path.name for path in (run.run_dir / "slurm").glob("*.log")) == [
        f"{job}{node}.log" for node in ("-n1", "-n2", "")
    ]
    # Once more: nothing is left to do, and it succeeds.
    job = cluster.run("sbatch", "--parsable", "saved", folder=tmp_path).strip()
    assert TrainJob(cluster, job, run.run_dir).rows_at_the_end() == expected
    assert "all 50 steps are done; nothing to do" in cluster.log_of(job)
