"""Slurm's daemons on this machine: their configuration, and their lifetime in the tests."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from data_support import children_of, wait_until

CONTROLLER = "head"
NODE_CPUS = 8
NODE_GPUS = 2
NODE_MEGABYTES = 64_000

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
# The process and its children have their own processes, mounts and host name. All of them die with
# the first process, even in a new session; that one dies with `unshare`, and `unshare` with the
# tests, even when they are killed.
_NAMESPACES = [
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
]
# The shell stays as the first process and reaps orphans, which a daemon does not.
_AS_HOST = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && { "$@" & wait; }'


def why_no_slurm() -> str | None:
    """Return why no cluster can be started on this machine, or None."""
    if not all(map(shutil.which, _PROGRAMS)) or os.geteuid() != 0:
        return "Slurm is not there (Debian: slurm-wlm and munge), or cannot be started without root"
    probe = [*_NAMESPACES, "sh", "-c", _AS_HOST, "/etc/hosts", "probe", "true"]
    failed = subprocess.run(probe, capture_output=True, text=True, check=False)
    if failed.returncode:
        return f"a node of Slurm cannot have a host name of its own here: {failed.stderr.strip()}"
    return None


class Daemon:
    """A daemon on its own host: own host name, own processes, and `hosts` as its /etc/hosts.

    Its output goes to `log`. It leaves its parent's process group, so that Ctrl-C ends the tests,
    and they end it.
    """

    def __init__(
        self, host: str, hosts: Path, command: Sequence[str], environment: dict[str, str], log: Path
    ) -> None:
        with open(log, "ab") as output:
            self._unshare = subprocess.Popen(
                [*_NAMESPACES, "sh", "-c", _AS_HOST, str(hosts), host, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def is_running(self) -> bool:
        return self._unshare.poll() is None

    def kill(self) -> None:
        """End it like a power loss: nothing on the host runs when this returns."""
        if self.is_running():
            # Its first process ends only after all others have.
            for first in children_of(self._unshare.pid):
                os.kill(first, signal.SIGKILL)
            try:
                self._unshare.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._unshare.kill()
        self._unshare.wait()


def start_munge(folder: Path, socket_path: Path, hosts: Path) -> Daemon:
    """Start a munged with its own key; it accepts requests when this returns."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    command = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_path}"]
    command += [f"--{name}-file={folder / f'munge.{name}'}" for name in ("pid", "log", "seed")]
    daemon = Daemon(CONTROLLER, hosts, command, dict(os.environ), folder / "munged.out")
    wait_until(socket_path.exists)
    return daemon


def write_configuration(
    folder: Path, munge_socket: Path, nodes: Sequence[str], further: Mapping[str, object]
) -> Path:
    """Write slurm.conf, gres.conf and a hosts file in which every host is this machine.

    Settings that make this cluster react fast:
      SchedulerParameters: a job starts within about a second once it may.
      cred_expire: how long a requeued job waits; Slurm's default is two minutes.
      SlurmdTimeout: how long a node may be silent before it is down and its jobs are requeued;
        two pings must fail for it, each after MessageTimeout.
      KillWait: from SIGTERM to SIGKILL when a job is cancelled or out of time.
    The time limit cannot be made finer: it is checked every 30 seconds.
    """
    names = [CONTROLLER, *nodes]
    own_names = "".join(f"127.0.0.1 {name}\n" for name in names)
    (folder / "hosts").write_text(own_names + Path("/etc/hosts").read_text())
    for gpu in range(NODE_GPUS):
        (folder / f"gpu{gpu}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{NODE_GPUS - 1}]\n")
    controller_port, *node_ports = _free_ports(1 + len(nodes))
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{CONTROLLER}(127.0.0.1)",
        "SlurmctldPort": controller_port,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={munge_socket},cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd-%n.log",
        "SlurmctldDebug": "verbose",
        "MailProg": "/bin/true",
        "MpiDefault": "none",
        # No cgroups: they belong to the machine.
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "GresTypes": "gpu",
        # The nodes may have more CPUs than the machine.
        "SlurmdParameters": "config_overrides",
        # Ports derived from job ids must not collide with those of another cluster.
        "FirstJobId": random.randrange(1_000, 50_000, 100),
        # Finished jobs can still be queried; there is no accounting.
        "MinJobAge": 3600,
        "JobRequeue": 1,
        # A lost node comes back by itself, one that was set down does not.
        "ReturnToService": 1,
        "SlurmdTimeout": 5,
        "MessageTimeout": 5,
        "KillWait": 10,
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1",
        **further,
    }
    node = f"CPUs={NODE_CPUS} RealMemory={NODE_MEGABYTES} Gres=gpu:{NODE_GPUS} NodeAddr=127.0.0.1"
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [
        f"NodeName={name} NodeHostname={name} Port={port} {node}"
        for name, port in zip(nodes, node_ports, strict=True)
    ]
    lines += ["PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"]
    path = folder / "slurm.conf"
    path.write_text("\n".join(lines) + "\n")
    (folder / "state").mkdir()
    return path


def _free_ports(number: int) -> list[int]:
    """Return ports below those that the system assigns, so that nobody gets them meanwhile."""
    ports: list[int] = []
    while len(ports) < number:
        port = random.randrange(10_000, 30_000)
        with closing(socket.socket()) as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
    return ports
