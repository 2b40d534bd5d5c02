"""Run the trials of a sweep on this machine, several at a time, until all have ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.display import SweepDisplay
from megaphase.sweep.fork_server import ForkServer
from megaphase.sweep.measurements import measurements, read_outcome
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.planning.pruning import PendingRun, sweep_state
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trial_run import (
    collect_results,
    has_diverged,
    has_ended,
    last_line,
    outcome_if_ended,
    train_arguments,
)
from megaphase.sweep.trials import Trial, all_trials
from megaphase.utils.cores import available_cores
from megaphase.utils.errors import (
    EXIT_FAILED,
    EndedAtOnce,
    Stopped,
)
from megaphase.utils.files import os_errors_named
from megaphase.utils.process_lifetime import ends_with_this_process
from megaphase.utils.python_command import python_command
from megaphase.utils.set_aside import make_way_for_file
from megaphase.utils.signals import SAME_PRESS_SECONDS, recorded_signals, signal_name

POLL_SECONDS = 0.2
_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Machine:
    """jobs: concurrent runs. processes: of each run. gpus: number of GPUs; 0 trains on CPUs."""

    jobs: int
    processes: int
    gpus: int

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment of the run in this slot: its GPUs, its CPU cores."""
        cores = available_cores() // (self.jobs * self.processes)
        environment = {"OMP_NUM_THREADS": str(max(1, cores)), **os.environ}
        if self.gpus and self.jobs > 1:
            own = slice(slot * self.processes, (slot + 1) * self.processes)
            environment[_DEVICES] = ",".join(_visible_gpus(self.gpus)[own])
        return environment | ends_with_this_process()


def _visible_gpus(number: int) -> list[str]:
    """The names of the GPUs that this process may use, by number or UUID."""
    names = [name.strip() for name in os.environ.get(_DEVICES, "").split(",") if name.strip()]
    return names[:number] or list(map(str, range(number)))


class Process(Protocol):
    """The part of subprocess.Popen that is used."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def send_signal(self, number: signal.Signals) -> None: ...


Start = Callable[[Sequence[str], Path, Mapping[str, str]], Process]
"""Starts a `megaphase` command, given its arguments, its log and its environment."""


def start_command(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
    """Start it as a process of this Python, with its output appended to the log."""
    with os_errors_named(log):
        make_way_for_file(log, "a log")
    with open(log, "ab") as file:
        return subprocess.Popen(
            python_command("megaphase", *command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # only this process handles Ctrl-C
        )


@contextlib.contextmanager
def starter(sweep: Sweep, machine: Machine) -> Iterator[Start]:
    """Provide the quickest way to start the runs of a sweep on this machine."""
    if machine.gpus or machine.processes > 1:
        yield start_command
        return
    parts = [trial.run.get("parts") or {} for trial in all_trials(sweep)]
    compiled = any(each.get("kernels") == "compile" for each in parts)
    with ForkServer(compiled=compiled) as server:
        yield server.start


@dataclass
class _RunningTrial:
    """A run in progress: its current command, and the following ones.

    end_after: see PendingRun.
    """

    trial: Trial
    end_after: int | None
    slot: int
    commands: list[list[str]]
    process: Process = field(init=False)


def run_locally(
    sweep: Sweep,
    directory: SweepDirectory,
    machine: Machine,
    display: SweepDisplay,
    start: Start = start_command,
) -> dict[str, Outcome]:
    """Train all runs that have not ended yet; returns the outcomes of all that have ended or were
    pruned.

    A run that fails, diverges or is stopped by a signal of its own is recorded and left out; the
    others continue. The caller holds the lock of the directory.

    Raises:
        Stopped: a signal arrived, and the runs have saved.
        EndedAtOnce: a second Ctrl-C arrived, and the runs were killed.
    """
    with recorded_signals() as received:
        return _Runner(sweep, directory, machine, display, start, received).run()


class _Runner:
    def __init__(
        self,
        sweep: Sweep,
        directory: SweepDirectory,
        machine: Machine,
        display: SweepDisplay,
        start: Start,
        received: list[signal.Signals],
    ) -> None:
        self._sweep, self._directory = sweep, directory
        self._machine, self._display = machine, display
        self._start, self._received = start, received
        self._outcomes = directory.outcomes()  # of runs that have ended by themselves
        self._state = sweep_state(sweep, self._outcomes, directory.rungs())
        self._jobs: dict[str, _RunningTrial] = {}
        self._forwarded_count = 0  # signals already forwarded
        self._first_forwarded_at: float | None = None

    def run(self) -> dict[str, Outcome]:
        self._collect(partial(outcome_if_ended, self._sweep, self._directory))
        try:
            self._start_ready_trials()
            while self._jobs:
                time.sleep(POLL_SECONDS)
                self._forward_signals()
                self._poll_jobs()
        finally:
            self._kill_all()
        if self._received:
            raise Stopped(
                f"{signal_name(self._received[0])} was received: the runs have saved; the same "
                "command resumes from there"
            )
        return dict(self._state.outcomes)

    def _collect(self, find_outcome: Callable[[Trial], Outcome | None]) -> None:
        """Take note of what runs have come to since the last time."""
        self._state = collect_results(
            self._sweep,
            self._directory,
            self._display,
            self._outcomes,
            find_outcome,
            is_busy=lambda trial: trial.name in self._jobs,
        )

    def _start_ready_trials(self) -> None:
        """Start runs, at the start and whenever one has ended, which determines further ones."""
        if self._received:
            return
        for pending in self._state.pending_runs:
            if len(self._jobs) == self._machine.jobs:
                return
            if pending.trial.name not in self._jobs:
                self._begin(pending)

    def _begin(self, pending: PendingRun) -> None:
        trial, end_after = pending
        run_file = self._directory.write_run_file(self._sweep, trial)
        taken = {job.slot for job in self._jobs.values()}
        slot = next(slot for slot in range(self._machine.jobs) if slot not in taken)
        commands = [
            train_arguments(self._directory, trial, run_file, self._machine.processes, end_after)
        ]
        for each in measurements(self._sweep, trial):
            result = each.result(self._directory, trial.name)
            commands.append(each.arguments(self._sweep, trial, run_file, result))
        job = _RunningTrial(trial, end_after, slot, commands)
        self._start_next_command(job)
        self._jobs[trial.name] = job
        self._display.begin(trial, self._directory.run(trial.name))

    def _start_next_command(self, job: _RunningTrial) -> None:
        log = self._directory.log(job.trial.name)
        job.process = self._start(job.commands.pop(0), log, self._machine.environment(job.slot))

    def _forward_signals(self) -> None:
        """The first one lets the runs save; Ctrl-C after it ends them at once."""
        received = self._received
        if received and self._first_forwarded_at is None:
            self._first_forwarded_at, self._forwarded_count = time.monotonic(), len(received)
            for job in self._jobs.values():
                job.process.send_signal(received[0])
            if received[0] == signal.SIGINT:
                self._display.say("the runs save and end; press Ctrl-C again to end them at once")
        elif (
            self._first_forwarded_at is not None
            and signal.SIGINT in received[self._forwarded_count :]
        ):
            self._forwarded_count = len(received)
            if time.monotonic() - self._first_forwarded_at > SAME_PRESS_SECONDS:
                raise EndedAtOnce(
                    "ended at once: what the runs had done since their newest checkpoints is lost; "
                    "the same command resumes from those"
                )

    def _poll_jobs(self) -> None:
        for name, job in list(self._jobs.items()):
            code = job.process.poll()
            if code is None:
                self._display.show(job.trial, self._directory.run(name))
            elif code == 0 and job.commands and not self._received and not self._is_paused(job):
                self._start_next_command(job)
            else:
                del self._jobs[name]
                self._record_outcome(job, code)
                self._start_ready_trials()

    def _record_outcome(self, job: _RunningTrial, code: int) -> None:
        name = job.trial.name
        if code == 0 and self._is_paused(job):
            self._display.drop(job.trial)
            self._collect(lambda trial: None)
            return
        if self._received and (code != 0 or job.commands):
            self._display.drop(job.trial)
            return
        diverged = code in (0, EXIT_FAILED) and has_diverged(self._directory, job.trial)
        if diverged or (code == 0 and has_ended(self._directory, job.trial)):
            outcome = read_outcome(self._sweep, self._directory, job.trial)
        else:
            outcome = Outcome(failed=_reason(code, self._directory.log(name)))
        self._directory.write_outcome(name, outcome)
        self._outcomes[name] = outcome
        self._display.end(job.trial, outcome, {**self._state.outcomes, **self._outcomes})
        self._collect(lambda trial: None)

    def _is_paused(self, job: _RunningTrial) -> bool:
        """Return whether a run that has ended well is to be compared before it trains on."""
        return job.end_after is not None and not has_ended(self._directory, job.trial)

    def _kill_all(self) -> None:
        for job in self._jobs.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
            self._display.drop(job.trial)


def _reason(code: int, log: Path) -> str:
    """Return why a command ended; if it was killed, its last line is not the reason."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code == 0:
        return "ended before its last step, with exit code 0"
    return last_line(log) or f"ended with exit code {code}"
