"""A Slurm of one node on this machine, from Debian's packages slurm-wlm and munge."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from data_support import wait_until

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")

needs_slurm = pytest.mark.skipif(
    not all(map(shutil.which, _PROGRAMS)) or os.geteuid() != 0,
    reason="Slurm is not there (Debian: slurm-wlm and munge), or cannot be started without root",
)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons; yields the environment in which sbatch finds them."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    # A Unix socket's path must be short.
    munge_socket = Path(f"/tmp/megaphase-munge-{os.getpid()}")
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    (folder / "slurm.conf").write_text(_configuration(folder, munge_socket))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    with ExitStack() as running:
        for command in (
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge_socket}"]
            + [f"--{name}-file={folder / name}" for name in ("pid", "log", "seed")],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D"],
        ):
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            running.callback(process.wait)
            running.callback(process.terminate)
            if command[0] == "munged":
                wait_until(munge_socket.exists)
        wait_until(lambda: "idle" in slurm(environment, "sinfo", "--noheader", "--format=%T"))
        yield environment


def slurm(environment: dict[str, str], *command: str) -> str:
    """What one of Slurm's commands prints; nothing where it fails."""
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    ).stdout


def wait_for_jobs(environment: dict[str, str], seconds: float = 120) -> None:
    """Wait until the queue is empty."""
    wait_until(lambda: not slurm(environment, "squeue", "--noheader"), seconds)


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _configuration(folder: Path, munge_socket: Path) -> str:
    host = socket.gethostname().split(".")[0]
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": host,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "SlurmctldPort": _free_port(),
        "SlurmdPort": _free_port(),
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={munge_socket}",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "SchedulerParameters": "sched_interval=1,batch_sched_delay=1,bf_interval=1",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [
        f"NodeName={host} CPUs={os.cpu_count()} State=UNKNOWN",
        "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]
    return "\n".join(lines) + "\n"
