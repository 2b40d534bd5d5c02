"""`megaphase launch slurm` on two nodes: the run is that of one machine, whatever happens to it.

What takes minutes is in test_train_job_slow.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from cluster import Cluster
from run_support import make_corpora, write_run_file
from train_job_support import TrainJob, rows_of_one_machine, settings


def test_a_disturbed_run_ends_as_an_undisturbed_one(cluster: Cluster, tmp_path: Path) -> None:
    corpora = make_corpora(tmp_path / "corpora")
    run_file = write_run_file(tmp_path / "a run", settings(corpora))
    job = TrainJob.submitted(cluster, run_file)
    expected = rows_of_one_machine(tmp_path / "undisturbed", corpora)

    job.train_further()
    job.signal("USR1")
    log = job.start_again()
    assert "\nn1: megaphase: SIGUSR1 came to rank 0: saved after step " in log
    assert f"\nmegaphase: job {job.job}: stopped after a checkpoint; the newest check" in log

    job.train_further()
    os.kill(job.process(3), signal.SIGKILL)
    log = job.start_again()
    last = [line for line in log.splitlines() if "megaphase: " in line][-2:]
    assert last[0].startswith("n1: megaphase: rank 3 on n2 (process ")
    assert "has ended without a word" in last[0]
    assert last[1].startswith(f"megaphase: job {job.job}: failed with exit code 137; ")
    assert last[1].endswith("; queued again")

    assert job.rows_at_the_end() == expected
    assert cluster.job(job.job)["Restarts"] == "2"
