"""`megaphase launch slurm` on two nodes: the run is that of one machine, whatever happens to it.

What takes minutes is in test_train_job_slow.py.
"""

from __future__ import annotations

from pathlib import Path

from cluster import Cluster
from run_support import make_corpora, write_run_file
from train_job_support import TrainJob, rows_of_one_machine, settings


def test_a_disturbed_run_ends_as_an_undisturbed_one(cluster: Cluster, tmp_path: Path) -> None:
    corpora = make_corpora(tmp_path / "corpora")
    run_file = write_run_file(tmp_path / "a run", settings(corpora))
    job = TrainJob.submitted(cluster, run_file)

    job.train_further()
    job.signal("USR1")
    log = job.start_again()
    assert "\nn1: megaphase: SIGUSR1 came to rank 0: saved after step " in log
    assert f"\nmegaphase: job {job.job}: stopped after a checkpoint; the newest check" in log

    expected = rows_of_one_machine(tmp_path / "undisturbed", corpora)
    assert job.rows_at_the_end() == expected
    assert cluster.job(job.job)["Restarts"] == "1"
