"""`megaphase launch slurm` on two nodes: the run equals that of one machine, whatever happens.

Tests that take minutes are in test_train_job_slow.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import Cluster
from run_support import make_corpora, run_settings, write_run_file
from train_job_support import LAYOUT, TrainJob, launch_slurm, rows_of_one_machine, settings


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.mark.slow
def test_a_disturbed_run_ends_as_an_undisturbed_one(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    run_file = write_run_file(tmp_path / "a run", settings(corpora))
    job = TrainJob.submitted(cluster, run_file)

    job.train_further()
    job.signal("USR1")
    log = job.start_again()
    assert "\nn1: megaphase: SIGUSR1 came to rank 0: saved after step " in log
    assert f"\nmegaphase: job {job.job}: stopped by a signal; the newest check" in log

    expected = rows_of_one_machine(tmp_path / "undisturbed", corpora)
    assert job.rows_at_the_end() == expected
    assert cluster.job(job.job)["Restarts"] == "1"


def test_variables_of_the_login_node_do_not_change_the_job(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    found = run_settings(corpora)
    found["phases"] = [{**found["phases"][0], "steps": 2}]
    run_file = write_run_file(tmp_path / "a run", found)
    variables = {"SBATCH_TIMELIMIT": "1", "SBATCH_JOB_NAME": "mine", "SBATCH_EXPORT": "ALL"}
    options = ["--nodes", 1, "--time", "10:00", "--sbatch", "--export=NONE"]
    environment = {**cluster.environment, **variables, "NOT_FOR_THE_JOB": "1"}
    done = launch_slurm(run_file.parent, environment, run_file, *LAYOUT, *options)
    assert done.returncode == 0, done.stderr
    job = TrainJob(cluster, done.stdout.splitlines()[0].split()[-1], run_file.parent / "run")
    fields = cluster.job(job.job)
    assert (fields["TimeLimit"], fields["JobName"]) == ("00:10:00", "megaphase-run")
    # Both processes inherit the variables that the script exports, such as MASTER_ADDR.
    assert [row["step"] for row in job.rows_at_the_end() if "loss" in row] == [1, 2]


def test_a_job_is_profiled(cluster: Cluster, corpora: Path, tmp_path: Path) -> None:
    found = run_settings(corpora)
    found["phases"] = [{**found["phases"][0], "steps": 4}]
    run_file = write_run_file(tmp_path / "a run", found)
    layout = ["--nodes", 1, "--tasks-per-node", 1]
    job = TrainJob.submitted(cluster, run_file, *layout, "--profile", "--profile-steps", 2)
    rows = job.rows_at_the_end()
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    (log,) = (job.run_dir / "slurm").glob(f"{job.job}-*.log")
    assert "Profile of steps 3 to 4 on rank 0 (CPU)" in log.read_text()
    profile = job.run_dir / "profile"
    assert json.loads((profile / "summary.json").read_text())["steps"] == [3, 4]
    assert [path.name for path in profile.glob("rank-*")] == ["rank-00000.json.gz"]
