"""A real Slurm of several nodes on this machine, from Debian's packages slurm-wlm and munge.

    with start_cluster(tmp_path, nodes=("n1", "n2")) as cluster:
        job = cluster.submit("srun hostname", "--nodes=2")
        cluster.wait_for(job, "COMPLETED")
        print(cluster.log_of(job))

Every node has its own host name and processes, and shares files and network with this machine; on
the nodes, and only there, all their names resolve to 127.0.0.1. A node claims more CPUs than the
machine may have, and GPUs that do not exist. Any number of clusters can run at once.

Differences from a real one: everything runs as root; a lost node's connections are closed, while
those of a node without power stay silent; without cgroups, ending a job misses its processes that
created their own session (`kill_node` and the end of the cluster miss none).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from daemons import CONTROLLER, Daemon, start_munge, why_no_slurm, write_configuration
from data_support import LIMIT_SECONDS, wait_until

NODES = ("n1", "n2")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}

_WHY_NOT = why_no_slurm()
needs_slurm = pytest.mark.skipif(_WHY_NOT is not None, reason=_WHY_NOT or "")


class Cluster:
    """Slurm's commands on a running cluster, and faults of its nodes."""

    def __init__(self, folder: Path, configuration: Path) -> None:
        self.folder = folder
        self.environment = {
            # The tests may themselves run as a job.
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(configuration),
        }
        self._daemons: dict[str, Daemon] = {}

    def run(self, *command: object, folder: Path | None = None) -> str:
        """Return the output of a Slurm command run in a folder; AssertionError if it fails."""
        done = self._call(*command, folder=folder)
        assert done.returncode == 0, f"{done.args}: {done.stderr}{done.stdout}"
        return done.stdout

    def submit(self, script: str, *options: object, folder: Path | None = None) -> str:
        """Submit lines of bash with sbatch; return the job's id.

        For a script file use `run("sbatch", "--parsable", file, ...)`.

        Args:
            options: of sbatch.
            folder: where the job runs and writes its log; by default the cluster's own.
        """
        command = ("sbatch", "--parsable", *options)
        done = self._call(*command, folder=folder, given=f"#!/bin/bash\n{script}\n")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`; of the first task if the job is an array."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        # Values may contain spaces, names do not.
        return dict(field.split("=", 1) for field in re.split(r" (?=[A-Z][A-Za-z_:/]*=)", shown))

    def state(self, job: str) -> str:
        """Return a job's state, such as PENDING, RUNNING, COMPLETED."""
        return self.job(job)["JobState"]

    def wait_for(self, job: str, *states: str, seconds: float = LIMIT_SECONDS) -> dict[str, str]:
        """Wait until a job is in one of these states; return its fields.

        Fails, with the logs of the job and of the controller, if it ends in another state.
        """
        end = time.monotonic() + seconds
        while (fields := self.job(job))["JobState"] not in states:
            if fields["JobState"] in ENDED or time.monotonic() > end:
                pytest.fail(f"job {job} is not {' or '.join(states)}\n{self._report(job, fields)}")
            time.sleep(0.05)
        return fields

    def wait_for_log(self, job: str, text: str, seconds: float = LIMIT_SECONDS) -> None:
        """Wait until a job's log contains a text; fails as `wait_for` does."""
        end = time.monotonic() + seconds
        while text not in self.log_of(job):
            fields = self.job(job)
            # Check once more: the text may have been written at the end.
            ended = fields["JobState"] in ENDED and text not in self.log_of(job)
            if ended or time.monotonic() > end:
                pytest.fail(f"job {job} did not print {text!r}\n{self._report(job, fields)}")
            time.sleep(0.05)

    def wait_for_all(self, seconds: float = LIMIT_SECONDS) -> None:
        """Wait until the queue is empty."""
        wait_until(lambda: not self.run("squeue", "--noheader"), seconds)

    def log_of(self, job: str) -> str:
        """Return a job's output; nothing before it first ran."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def hurry(self, job: str, seconds: float = LIMIT_SECONDS) -> None:
        """Let a requeued job start after two seconds; by itself it would after six."""
        self.wait_for(job, "PENDING", seconds=seconds)
        update = ("scontrol", "update", f"JobId={job}", "StartTime=now+2")
        # Refused while the job's earlier run is being cleaned up.
        wait_until(lambda: self._call(*update).returncode == 0, seconds)

    def node_state(self, node: str) -> str:
        """Return a node's state: idle, mixed, allocated, down, down* (the star: it does not
        answer)."""
        return self.run("sinfo", "--noheader", "--format=%T", f"--nodes={node}").strip()

    def wait_for_node(self, node: str, *states: str, seconds: float = LIMIT_SECONDS) -> None:
        wait_until(lambda: self.node_state(node) in states, seconds)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, at first or after `kill_node`, and wait until it accepts jobs."""
        assert node not in self._daemons, f"{node} runs"
        self._start(node, node, "slurmd", "-D", "-N", node)
        if self.node_state(node).startswith("down"):
            # Refused if it has already come back by itself.
            self._call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_for_node(node, "idle", "mixed", "allocated")

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd and everything that it runs, at once, as a crash does.

        The controller notices it after 10 to 25 seconds (node_state is then down*) and requeues the
        node's jobs; `down` makes it notice at once.
        """
        self._daemons.pop(node).kill()

    def down(self, node: str) -> None:
        """Tell the controller that a node is lost; its jobs are killed and requeued."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def up(self, node: str) -> None:
        """Return a running node that was set `down` or drained to service."""
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_for_node(node, "idle", "mixed", "allocated")

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers."""
        self._start("slurmctld", CONTROLLER, "slurmctld", "-D")
        wait_until(lambda: self._call("scontrol", "ping").returncode == 0)

    def kill_all(self) -> None:
        """Kill all processes of the cluster."""
        while self._daemons:
            self._daemons.popitem()[1].kill()

    def _start(self, name: str, host: str, *command: str) -> None:
        hosts, output = self.folder / "hosts", self.folder / f"{name}.out"
        self._daemons[name] = Daemon(host, hosts, command, self.environment, output)

    def _call(
        self, *command: object, folder: Path | None = None, given: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            cwd=folder or self.folder,
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_SECONDS,
        )

    def _report(self, job: str, fields: dict[str, str]) -> str:
        controller = (self.folder / "slurmctld.log").read_text().splitlines()[-30:]
        shown = [f"{name}={value}" for name, value in fields.items()]
        return "\n".join([*shown, "--- its log", self.log_of(job), "--- slurmctld", *controller])


@contextmanager
def start_cluster(
    folder: Path, nodes: Sequence[str] = NODES, **settings: object
) -> Iterator[Cluster]:
    """Start a cluster with its files in `folder`; takes less than a second.

    settings: further ones of slurm.conf, such as MaxArraySize=3.

    Call it from the main thread: the daemons die with the thread that started them.
    """
    with ExitStack() as running:
        # A Unix socket's path must be short.
        short = running.enter_context(tempfile.TemporaryDirectory(prefix="munge-"))
        munge_socket = Path(short, "socket")
        configuration = write_configuration(folder, munge_socket, nodes, settings)
        running.callback(start_munge(folder, munge_socket, folder / "hosts").kill)
        cluster = Cluster(folder, configuration)
        running.callback(cluster.kill_all)
        cluster.start_controller()
        for node in nodes:
            cluster.start_node(node)
        yield cluster
