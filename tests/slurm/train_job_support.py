"""What the tests of training jobs share: a run on two nodes, and what can happen to it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from cluster import Cluster
from data_support import LIMIT_SECONDS, wait_until
from distributed import check, launch
from run_support import (
    megaphase,
    read_rows,
    rows_so_far,
    run_settings,
    timeless,
    write_run_file,
)
from warm_process import WarmProcess

NODES, TASKS = 2, 2
STEPS = (30, 20)
LAYOUT = ["--nodes", NODES, "--gpus-per-node", 0, "--tasks-per-node", TASKS, "--cores", 1]


def settings(corpora: Path, **changes: Any) -> dict[str, Any]:
    """Tensor 2 × data 2, ZeRO-3: every tensor-parallel group on one node, every data-parallel one
    on both."""
    found = run_settings(corpora, parallel={"tensor": 2, "zero": 3}, **changes)
    for phase, steps in zip(found["phases"], STEPS, strict=True):
        phase["steps"] = steps
    return found


def rows_of_one_machine(folder: Path, corpora: Path) -> list[dict[str, Any]]:
    """The rows of the run on this machine alone, started as torchrun does."""
    run_file = write_run_file(folder, settings(corpora))
    check(launch(megaphase("train", run_file), NODES * TASKS))
    return timeless(read_rows(folder / "run"))


def launch_slurm(
    folder: Path, environment: dict[str, str], *arguments: object
) -> CompletedProcess[str]:
    """`megaphase launch slurm`, in a folder that gets its output."""
    stdout, stderr = folder / "stdout", folder / "stderr"
    for path in (stdout, stderr):
        path.unlink(missing_ok=True)
    argv = ["launch", "slurm", *(str(each) for each in arguments)]
    process = WarmProcess(
        "megaphase.cli:main", argv, stdout=stdout, stderr=stderr, env=environment, cwd=folder
    )
    code = process.wait(LIMIT_SECONDS)
    return CompletedProcess(argv, code, stdout.read_text(), stderr.read_text())


class TrainJob:
    """A job that trains a run file, and what can happen to it."""

    def __init__(self, cluster: Cluster, job: str, run_dir: Path) -> None:
        self.cluster, self.job, self.run_dir = cluster, job, run_dir

    @classmethod
    def submitted(cls, cluster: Cluster, run_file: Path, *options: object) -> TrainJob:
        """As a user does it."""
        folder = run_file.parent
        done = launch_slurm(folder, cluster.environment, run_file, *LAYOUT, *options)
        assert done.returncode == 0, done.stderr
        first = done.stdout.splitlines()[0]
        assert first.startswith("Submitted: job ")
        return cls(cluster, first.split()[-1], folder / "run")

    def train_further(self, steps: int = 3) -> None:
        """Wait until it has come so many steps further than ever before."""
        goal = self._step() + steps
        self.cluster.wait_for(self.job, "RUNNING")
        wait_until(lambda: self._step() >= goal or not self._runs())
        assert self._runs(), self.cluster.log_of(self.job)

    def signal(self, name: str) -> None:
        """Send a signal to all ranks, as Slurm does before a time limit."""
        self.cluster.run("scancel", f"--signal={name}", self.job)

    def process(self, rank: int) -> int:
        """The id of the process of a rank."""
        wanted = {f"SLURM_JOB_ID={self.job}".encode(), f"RANK={rank}".encode()}
        return min(pid for pid, given in _environments() if wanted <= given)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No rank goes on while the block runs; silent_seconds must be longer."""
        processes = [self.process(rank) for rank in range(NODES * TASKS)]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        yield
        for process in processes:
            os.kill(process, signal.SIGCONT)

    def start_again(self) -> str:
        """Wait until it is requeued, and let it start; its log up to then."""
        self.cluster.hurry(self.job)
        return self.cluster.log_of(self.job)

    def rows_at_the_end(self) -> list[dict[str, Any]]:
        """Wait until the job is done; all rows that can be reproduced.

        A stop between two checkpoints has one of its own, and is left out.
        """
        self.cluster.wait_for(self.job, "COMPLETED")
        assert self.cluster.log_of(self.job).splitlines()[-1] == (
            f"megaphase: job {self.job}: all phases are done"
        )
        rows = timeless(read_rows(self.run_dir))
        return [row for row in rows if row.get("event") != "stopped"]

    def _runs(self) -> bool:
        return self.cluster.state(self.job) == "RUNNING"

    def _step(self) -> int:
        return max((row["step"] for row in rows_so_far(self.run_dir)), default=0)


def _environments() -> list[tuple[int, set[bytes]]]:
    """Process ids, and what each process was given as its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            given = (process / "environ").read_bytes()
        except OSError:
            continue
        found.append((int(process.name), set(given.split(b"\0"))))
    return found
