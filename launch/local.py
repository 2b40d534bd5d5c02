"""Start one command as several processes on this machine, as torchrun would.

Unlike torchrun it passes the processes' exit code on (2 is wrong input, 75 wants to be requeued),
hands stop signals down to them, and adds nothing to what they print unless one was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from megaphase.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEUE, EXIT_WRONG_INPUT
from megaphase.parent import ends_with_this_process
from megaphase.signals import noted_signals

POLL_SECONDS = 0.1
# When a rank has failed the others learn of it from their watchdog, and tell more than this
# launcher could. Those that know nothing by then get SIGTERM, and SIGKILL after a grace period:
# to a rank that is stuck in a collective SIGTERM means to save, which it cannot.
PATIENCE_SECONDS = 15.0
GRACE_SECONDS = 10.0


def launch_local(command: Sequence[str], processes: int) -> int:
    """Run `python -m megaphase COMMAND...` as `processes` ranks; returns the exit code for all."""
    return run_as_ranks([sys.executable, "-m", "megaphase", *command], processes)


def run_as_ranks(
    argv: Sequence[str],
    processes: int,
    *,
    patience_seconds: float = PATIENCE_SECONDS,
    grace_seconds: float = GRACE_SECONDS,
) -> int:
    """Run a command as the ranks of one job until all have ended; none is left behind.

    SIGTERM and SIGUSR1 go to every rank, however often they come. Ctrl-C kills all. Ranks that go
    on when another has failed get SIGTERM after `patience_seconds`, and SIGKILL `grace_seconds`
    later.

    Returns 0 if all ranks do, else the most telling of the codes with which they ended by
    themselves: 2, 1, any other, 128 + the signal that killed one, 75. 130 after Ctrl-C.
    """
    with noted_signals() as received:
        job = _Job(_start(argv, processes))
        try:
            while not job.is_over():
                while received:
                    job.forward(received.pop(0))
                if job.seconds_since_failure() > patience_seconds:
                    job.stop(grace_seconds)
                time.sleep(POLL_SECONDS)
            return job.exit_code()
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        finally:
            job.kill()
            Console().show_cursor()  # a rank that is killed cannot put it back


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


def _start(argv: Sequence[str], processes: int) -> list[subprocess.Popen[bytes]]:
    port = free_port()
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    ranks: list[subprocess.Popen[bytes]] = []
    # A terminal sends Ctrl-C to all of them; the ranks leave it to this process to end them.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for rank in range(processes):
            environment = {
                "OMP_NUM_THREADS": threads,
                **os.environ,
                **rank_environment(rank, processes, port),
                **ends_with_this_process(),
            }
            ranks.append(subprocess.Popen(argv, env=environment))
    except BaseException:
        for started in ranks:
            started.kill()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    return ranks


class _Job:
    """The ranks that were started, and what became of them."""

    def __init__(self, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        self._ranks = ranks
        self._codes: dict[int, int] = {}  # of those that have ended by themselves, in their order
        self._stopped: set[int] = set()
        self._forwarded: set[int] = set()
        self._failed_at: float | None = None

    def is_over(self) -> bool:
        """Look after all ranks; whether all have ended."""
        for number, rank in self._left():
            code = rank.poll()
            if code is not None:
                self._note(number, code)
        return not self._left()

    def _left(self) -> list[tuple[int, subprocess.Popen[bytes]]]:
        return [
            (number, rank)
            for number, rank in enumerate(self._ranks)
            if number not in self._codes and number not in self._stopped
        ]

    def _note(self, number: int, code: int) -> None:
        self._codes[number] = code
        if code not in (0, EXIT_REQUEUE) and self._failed_at is None:
            self._failed_at = time.monotonic()
        if code < 0 and -code not in self._forwarded:
            process, name = self._ranks[number].pid, signal.Signals(-code).name
            text = f"megaphase: rank {number} (process {process}) was killed by {name}"
            print(text, file=sys.stderr, flush=True)

    def seconds_since_failure(self) -> float:
        """How long ago the first rank failed; 0 if none has."""
        return 0.0 if self._failed_at is None else time.monotonic() - self._failed_at

    def forward(self, number: signal.Signals) -> None:
        """Send a signal to all ranks that are left."""
        self._forwarded.add(number)
        for _, rank in self._left():
            rank.send_signal(number)

    def stop(self, grace_seconds: float) -> None:
        """End the ranks that are left; their exit codes tell nothing."""
        deadline = time.monotonic() + grace_seconds
        left = self._left()
        for number, rank in left:
            self._stopped.add(number)
            rank.terminate()
        for _, rank in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Leave no rank behind."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.wait()

    def exit_code(self) -> int:
        """What the ranks that ended by themselves say together; see `run_as_ranks`."""
        codes = list(self._codes.values())
        for telling in (EXIT_WRONG_INPUT, EXIT_FAILED):
            if telling in codes:
                return telling
        own = [code for code in codes if code > 0 and code != EXIT_REQUEUE]
        killed = [128 - code for code in codes if code < 0]
        requeue = [code for code in codes if code == EXIT_REQUEUE]
        return next(iter([*own, *killed, *requeue]), 0)
