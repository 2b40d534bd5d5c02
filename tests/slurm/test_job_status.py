"""`launch status` of a job on a real Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from data_support import wait_until

from megaphase.launch.slurm.job_file import remember_job
from megaphase.launch.slurm.status import read_status


def test_a_job_held_running_queued_again_and_forgotten(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    job = cluster.submit(
        "sleep 60", "--hold", "--requeue", "--exclude=n1", "--comment=a Restarts=9"
    )
    remember_job(tmp_path / "run", job, tmp_path / "log")
    status = read_status(tmp_path / "run")
    assert (status.job, status.state, status.reason) == (job, "PENDING", "JobHeldUser")
    assert (status.restarts, status.nodes, status.excluded) == (0, None, "n1")
    cluster.run("scontrol", "release", job)
    cluster.wait_for(job, "RUNNING")
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason, status.nodes) == ("RUNNING", None, "n2")
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: read_status(tmp_path / "run").state == "PENDING")
    assert read_status(tmp_path / "run").restarts == 1
    cluster.run("scancel", job)
    wait_until(lambda: read_status(tmp_path / "run").state == "CANCELLED")
    remember_job(tmp_path / "run", f"{int(job) + 9999}", tmp_path / "log")
    status = read_status(tmp_path / "run")
    assert (status.state, status.restarts) == ("no longer known to Slurm", None)
