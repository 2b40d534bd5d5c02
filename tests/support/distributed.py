"""Start real processes over gloo like torchrun, and collect what each rank prints or returns.

`launch` runs a command; `run_ranks` runs a function of a test module in new interpreters.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from subprocess import CompletedProcess
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from warm_process import WarmProcess

from megaphase.distributed.all_ranks import leaving_processes
from megaphase.launch.local import free_port, rank_environment

P = ParamSpec("P")
T = TypeVar("T")

# For a job that hangs, even on a loaded machine.
LAUNCH_TIMEOUT_SECONDS = 600.0
# A rank whose neighbour has failed may wait for it in a collective forever.
GRACE_SECONDS = 30.0
POLL_SECONDS = 0.05
MOMENT_POLL_SECONDS = 0.001
SHOWN_CHARACTERS = 6000

# Commands that warm processes can run.
FIRST_ARGUMENT = 3
WARM = {
    (sys.executable, "-m", "megaphase"): "megaphase.cli:main",
    (sys.executable, "-m", "distributed"): "distributed:serve",
}


class LaunchError(AssertionError):
    """A rank failed or the time limit passed; the message contains the output of the ranks."""


class RunningRanks:
    """The processes of one job, each in its own process group; leaving the block kills them.

    Their output goes to files, so that a rank that prints much never blocks.
    """

    def __init__(
        self,
        argv: Sequence[object],
        processes: int,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        """prepare: called in every rank before a megaphase command; must be picklable."""
        self._argv = [str(each) for each in argv]
        self._prepare = prepare
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        port = free_port()
        self.processes = [
            self._start(
                rank,
                {**rank_environment(rank, processes, port), **(env or {})},
                cwd,
            )
            for rank in range(processes)
        ]

    def _start(
        self, rank: int, env: Mapping[str, str], cwd: Path | None
    ) -> subprocess.Popen[bytes] | WarmProcess:
        function = WARM.get(tuple(self._argv[:FIRST_ARGUMENT]))
        if function is not None:
            return WarmProcess(
                function,
                self._argv[FIRST_ARGUMENT:],
                stdout=self._output(rank, "stdout"),
                stderr=self._output(rank, "stderr"),
                env=env,
                cwd=cwd,
                prepare=self._prepare,
            )
        assert self._prepare is None
        with (
            open(self._output(rank, "stdout"), "wb") as stdout,
            open(self._output(rank, "stderr"), "wb") as stderr,
        ):
            return subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, **env},
                cwd=cwd,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self._folder.cleanup()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every running rank and its children."""
        for process in self.processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    _signal_group(process.pid, number)

    def wait_for(
        self, happened: Callable[[], bool], timeout: float = LAUNCH_TIMEOUT_SECONDS
    ) -> None:
        """Wait until the ranks have fulfilled a condition.

        Raises:
            LaunchError: a rank has ended before, or the time limit has passed.
        """
        deadline = time.monotonic() + timeout
        while True:
            # Polled first, since a rank may fulfil the condition just before its end.
            ended = any(process.poll() is not None for process in self.processes)
            if happened():
                return
            if ended or time.monotonic() > deadline:
                raise LaunchError(f"the moment never came\n{self._what_was_said()}")
            time.sleep(MOMENT_POLL_SECONDS)

    def wait(self, timeout: float = LAUNCH_TIMEOUT_SECONDS) -> list[CompletedProcess[str]]:
        """Wait until all ranks have ended; those that outlive a failed one too long are killed.

        Raises:
            LaunchError: the time limit has passed; all ranks have been killed.
        """
        deadline = time.monotonic() + timeout
        while None in (codes := [process.poll() for process in self.processes]):
            now = time.monotonic()
            if now > deadline:
                self.signal(signal.SIGKILL)
                raise LaunchError(f"not done after {timeout:.0f} s\n{self._what_was_said()}")
            if any(codes):
                deadline = min(deadline, now + GRACE_SECONDS)
                self._kill_survivors_at(deadline)
                break
            time.sleep(POLL_SECONDS)
        return [self.result(rank) for rank in range(len(self.processes))]

    def _kill_survivors_at(self, deadline: float) -> None:
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def result(self, rank: int) -> CompletedProcess[str]:
        """Return a rank's output so far, and its exit code (negative: a signal)."""
        stdout, stderr = (
            self._output(rank, name).read_text(errors="replace") for name in ("stdout", "stderr")
        )
        code = self.processes[rank].poll()
        return CompletedProcess(self._argv, 0 if code is None else code, stdout, stderr)

    def _output(self, rank: int, name: str) -> Path:
        return Path(self._folder.name) / f"{rank}.{name}"

    def _what_was_said(self) -> str:
        ranks = range(len(self.processes))
        return "\n".join(f"rank {rank}: {_tail(self.result(rank).stderr)}" for rank in ranks)


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:  # it has started, but has no process group yet
        os.kill(pid, number)


def _tail(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"… {text[-SHOWN_CHARACTERS:]}"


def launch(
    argv: Sequence[object],
    processes: int,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = LAUNCH_TIMEOUT_SECONDS,
    prepare: Callable[[], object] | None = None,
) -> list[CompletedProcess[str]]:
    """Run a command as the ranks of one job; return one result per rank, whatever its exit code.

    prepare: see RunningRanks.
    """
    with RunningRanks(argv, processes, env=env, cwd=cwd, prepare=prepare) as ranks:
        return ranks.wait(timeout)


def check(results: Sequence[CompletedProcess[str]]) -> None:
    """Fail with the standard error of the ranks that failed by themselves."""
    failed = [rank for rank, result in enumerate(results) if result.returncode]
    # Surviving ranks are killed, so a rank with its own exit code is the better witness.
    failed = [rank for rank in failed if results[rank].returncode != -signal.SIGKILL] or failed
    if failed:
        raise LaunchError(
            "\n".join(
                f"rank {rank} ended with {results[rank].returncode}:\n{_tail(results[rank].stderr)}"
                for rank in failed
            )
        )


def run_ranks(
    function: Callable[..., Any],
    processes: int,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    timeout: float = LAUNCH_TIMEOUT_SECONDS,
) -> list[Any]:
    """Call a module-level function of a test module in new interpreters, one per rank.

    Returns its result on every rank; arguments and results are pickled.
    """
    module = function.__module__
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = Path(folder) / "call"
        call.write_bytes(pickle.dumps(arguments))
        argv = [sys.executable, "-m", "distributed", module, function.__qualname__, call, folder]
        check(launch(argv, processes, env=env, timeout=timeout))
        return [
            pickle.loads((Path(folder) / f"result-{rank}").read_bytes())
            for rank in range(processes)
        ]


def once(function: Callable[P, T]) -> Callable[P, T]:
    """Like functools.cache, but also remembers a LaunchError, so that no job is run again."""

    @cache
    def outcome(*args: P.args, **kwargs: P.kwargs) -> T | LaunchError:
        try:
            return function(*args, **kwargs)
        except LaunchError as error:
            return error

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        result = outcome(*args, **kwargs)  # type: ignore[arg-type]  # not known to be hashable
        if isinstance(result, LaunchError):
            raise LaunchError(str(result))
        return result

    return call


def serve() -> None:
    """Run in the processes started by `run_ranks`."""
    module, function, call, folder = sys.argv[1:]
    arguments = pickle.loads(Path(call).read_bytes())
    with leaving_processes():
        result = getattr(importlib.import_module(module), function)(*arguments)
    (Path(folder) / f"result-{os.environ['RANK']}").write_bytes(pickle.dumps(result))
