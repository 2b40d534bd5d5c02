"""Start one command as several processes on this machine, like torchrun.

Unlike torchrun it returns the processes' exit code (2: invalid input, 75: to be requeued), forwards
stop signals to them, and reports in one line why a job with a dead rank has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megaphase.distributed.dist_env import REPORTS_VARIABLE
from megaphase.fault_tolerance.fault_detector import GONE
from megaphase.utils.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEUE, EXIT_WRONG_INPUT
from megaphase.utils.process_lifetime import ends_with_this_process
from megaphase.utils.python_command import python_command
from megaphase.utils.signals import (
    SAME_PRESS_SECONDS,
    exit_code_after,
    recorded_signals,
    signals_blocked,
)
from megaphase.utils.standard_streams import new_console

POLL_SECONDS = 0.05
# When a rank fails, the others learn it from their watchdog, which reports more than this launcher
# could. Those that do not learn it get SIGTERM, and SIGKILL after a grace period: a rank that is
# blocked in a collective handles SIGTERM by saving, which it cannot.
PATIENCE_SECONDS = 15.0
GRACE_SECONDS = 10.0
# Exit codes of a rank that has reported the reason itself, or had none to report.
_OWN_CODES = (0, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_REQUEUE, EXIT_INTERRUPTED)


@dataclass(frozen=True)
class ExitMessages:
    """Messages about a job whose ranks cannot report: functions, called when they are needed.

    resume_point: what the same command does after a fault. loss: what is lost by ending at once.
    """

    resume_point: Callable[[], str] = lambda: ""
    loss: Callable[[], str] = lambda: ""


def launch_local(command: Sequence[str], processes: int, exit_messages: ExitMessages) -> int:
    """Run `python -m megaphase COMMAND...` as `processes` ranks; returns the common exit code."""
    return run_as_ranks(python_command("megaphase", *command), processes, exit_messages)


def run_as_ranks(
    argv: Sequence[str],
    processes: int,
    exit_messages: ExitMessages | None = None,
    *,
    patience_seconds: float = PATIENCE_SECONDS,
    grace_seconds: float = GRACE_SECONDS,
) -> int:
    """Run a command as the ranks of one job until all have ended; no process is left behind.

    SIGTERM, SIGUSR1 and Ctrl-C are forwarded to every rank; a second Ctrl-C kills all. Ranks that
    keep running after another one has ended get SIGTERM after `patience_seconds`, and SIGKILL
    `grace_seconds` later.

    Returns 0 if all ranks do. Otherwise 1 if a rank was killed, 75 if a forwarded stop signal has
    ended a rank, 130 after the second Ctrl-C; else the first of 2, 1, any other code, 130 and 75
    with which a rank has ended by itself.
    """
    exit_messages = exit_messages or ExitMessages()
    with recorded_signals() as received, _Reports() as reports:
        job = _RankProcesses(_start(argv, processes, reports.descriptor), reports, exit_messages)
        pressed: float | None = None
        try:
            while not job.is_over():
                while received:
                    number = received.pop(0)
                    if number == signal.SIGINT:
                        before, pressed = pressed, time.monotonic()
                        if before is not None and pressed - before > SAME_PRESS_SECONDS:
                            job.kill()
                            _say("ended at once", exit_messages.loss(), separator=": ")
                            return EXIT_INTERRUPTED
                    job.forward(number)
                if job.seconds_since_end() > patience_seconds:
                    job.stop(grace_seconds)
                time.sleep(POLL_SECONDS)
            job.report_cause()
            return job.exit_code()
        finally:
            job.kill()
            new_console().show_cursor()  # a rank that is killed cannot restore it


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a rank on a single node."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """Return a TCP port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(*parts: str, separator: str = ". ") -> None:
    print(f"megaphase: {separator.join(filter(None, parts))}", file=sys.stderr, flush=True)


class _Reports:
    """A pipe through which ranks report why the job ends; see `report_end`."""

    def __enter__(self) -> _Reports:
        self._read, self.descriptor = os.pipe()
        os.set_blocking(self._read, False)
        self._bytes = b""
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._read)
        os.close(self.descriptor)

    def first(self) -> dict[str, Any] | None:
        """Return the first report, or None as long as there is none."""
        with contextlib.suppress(BlockingIOError):
            self._bytes += os.read(self._read, 1 << 20)
        line, end, _ = self._bytes.partition(b"\n")
        return json.loads(line) if end else None


def _start(argv: Sequence[str], processes: int, reports: int) -> list[subprocess.Popen[bytes]]:
    port = free_port()
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            environment = {
                "OMP_NUM_THREADS": threads,
                **os.environ,
                **rank_environment(rank, processes, port),
                **ends_with_this_process(),
                REPORTS_VARIABLE: str(reports),
            }
            with signals_blocked():
                ranks.append(subprocess.Popen(argv, env=environment, pass_fds=[reports]))
    except BaseException:
        for started in ranks:
            started.kill()
        raise
    return ranks


class _RankProcesses:
    """The started ranks and their exit codes."""

    def __init__(
        self,
        ranks: Sequence[subprocess.Popen[bytes]],
        reports: _Reports,
        exit_messages: ExitMessages,
    ) -> None:
        self._ranks, self._reports, self._exit_messages = ranks, reports, exit_messages
        self._codes: dict[int, int] = {}  # of ranks that ended by themselves, in their order
        self._stopped: set[int] = set()
        self._forwarded: list[signal.Signals] = []
        self._ended_at: float | None = None
        self._reported = False

    def is_over(self) -> bool:
        """Poll all ranks; return whether all have ended."""
        self._poll_ranks()
        if self._reports.first() is not None:
            self._poll_ranks()  # a rank that died before the report has ended by now
            self.report_cause()
        return not self._left()

    def _poll_ranks(self) -> None:
        polled = [(number, rank.poll()) for number, rank in self._left()]
        ended = [(number, code) for number, code in polled if code is not None]
        # Of ranks that end together, a killed one was the first, and one that aborts the last.
        for number, code in sorted(ended, key=lambda each: _order(each[1])):
            self._codes[number] = code
            if code != 0 and self._ended_at is None:
                self._ended_at = time.monotonic()

    def _left(self) -> list[tuple[int, subprocess.Popen[bytes]]]:
        return [
            (number, rank)
            for number, rank in enumerate(self._ranks)
            if number not in self._codes and number not in self._stopped
        ]

    def _died(self) -> Iterator[tuple[int, str]]:
        """Yield the ranks that could not report why they ended, in their order, and how they
        ended."""
        for number, code in self._codes.items():
            if code < 0 and -code not in self._forwarded:
                yield number, f"was killed by {_signal_name(-code)}"
            elif code > 0 and code not in _OWN_CODES:
                yield number, f"ended with exit code {code}"

    def report_cause(self) -> None:
        """Report once, in one line, which rank died or, if none has died, what a rank has
        reported."""
        report = self._reports.first()
        died = dict(self._died())
        if self._reported or not (report or died):
            return
        self._reported = True
        first = next(iter(died), None)
        if first is not None and (report is None or report["rank"] != first):
            process = self._ranks[first].pid
            rank = f"rank {first} (process {process}) {died[first]}; all processes end"
            _say(rank, self._exit_messages.resume_point())
        elif report is not None:
            for line in report["lines"]:
                message = line if first is None else line.replace(GONE, died[first])
                print(message, file=sys.stderr, flush=True)

    def seconds_since_end(self) -> float:
        """Return the seconds since the first rank ended with a code other than 0; 0 if none has."""
        return 0.0 if self._ended_at is None else time.monotonic() - self._ended_at

    def forward(self, number: signal.Signals) -> None:
        """Send a signal to all ranks that still run."""
        self._forwarded.append(number)
        for _, rank in self._left():
            rank.send_signal(number)

    def stop(self, grace_seconds: float) -> None:
        """End the ranks that still run; their exit codes are ignored."""
        deadline = time.monotonic() + grace_seconds
        left = self._left()
        self.report_cause()
        for number, rank in left:
            self._stopped.add(number)
            rank.terminate()
        for _, rank in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kill all ranks."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.wait()

    def exit_code(self) -> int:
        """Return the common exit code of the ranks that ended by themselves; see `run_as_ranks`."""
        codes = [
            code if code >= 0 else self._code_of_killed(-code) for code in self._codes.values()
        ]
        by_priority = [EXIT_WRONG_INPUT, EXIT_FAILED]
        if self._forwarded:
            # A rank that is stopped while the job starts may make others fail.
            by_priority = [EXIT_WRONG_INPUT, EXIT_REQUEUE, EXIT_INTERRUPTED, EXIT_FAILED]
        stopped = (0, EXIT_REQUEUE, EXIT_INTERRUPTED)
        others = [code for code in codes if code not in stopped]
        return next(
            (code for code in (*by_priority, *others) if code in codes), max(codes, default=0)
        )

    def _code_of_killed(self, number: int) -> int:
        return exit_code_after(number) if number in self._forwarded else EXIT_FAILED


def _order(code: int) -> int:
    if code >= 0:
        return 1
    return 2 if -code == signal.SIGABRT else 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
