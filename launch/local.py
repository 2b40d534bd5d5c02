"""Start one command as several processes on this machine, as torchrun would.

Unlike torchrun it passes the processes' exit code on (2 is wrong input, 75 wants to be requeued)
and adds nothing to what they print.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

POLL_SECONDS = 0.1
GRACE_SECONDS = 20.0


def launch_local(command: Sequence[str], processes: int) -> int:
    """Run `python -m megaphase COMMAND...` as `processes` ranks; returns the first failure's code.

    When a rank fails the others get SIGTERM, and SIGKILL after a grace period.
    """
    port = free_port()
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    ranks = []
    try:
        for rank in range(processes):
            environment = {
                "OMP_NUM_THREADS": threads,
                **os.environ,
                **rank_environment(rank, processes, port),
            }
            ranks.append(
                subprocess.Popen([sys.executable, "-m", "megaphase", *command], env=environment)
            )
        return _wait(ranks)
    finally:
        _stop(ranks)


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank on a single node."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A TCP port on this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all are done or one has failed."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failures = [code for code in codes if code]
        if failures:
            return failures[0] if failures[0] > 0 else 128 - failures[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_SECONDS)


def _stop(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Leave no rank behind."""
    deadline = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGTERM)
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
