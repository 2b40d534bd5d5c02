"""A small "training" with an all-reduce in each step, in which one rank can fail in many ways."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# The end of a rank makes torch's own threads log; the command line silences them in the same way.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.distributed as dist

from megaphase.distributed.all_ranks import process_group
from megaphase.fault_tolerance.watchdog import Watchdog
from megaphase.launch.local import free_port, rank_environment
from megaphase.utils.errors import InputError, Interrupted, RunError, exit_code

SILENT_SECONDS = 2.0
FAULTY_STEP, STEPS = 3, 6
FOR_EVER = 600
_watchdog: Watchdog
# Generous, so that a loaded machine does not fail a test.
LIMIT_SECONDS = 90.0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    time.sleep(FOR_EVER)


def work_in_c() -> None:
    """Make one call into C that keeps Python's lock for more than SILENT_SECONDS."""
    began = time.monotonic()
    sum(range(trial := 10_000_000))
    trial_seconds = time.monotonic() - began
    sum(range(int(trial * 1.6 * SILENT_SECONDS / trial_seconds)))


def fail() -> None:
    raise ValueError("out of cheese\nand of bread")


def fail_in_a_collective() -> None:
    """Raise an error that looks as if another rank had died."""
    dist.all_reduce(torch.ones(4).to_sparse(), op=dist.ReduceOp.MAX)


def interrupt() -> None:
    raise Interrupted("SIGTERM", 75)


def die_under_others() -> None:
    """Die so that the others see it in an error without a frame of a collective."""
    die()


def exit() -> None:
    """Exit as a library might."""
    sys.exit(0)


def stop() -> None:
    """End the run in another thread, without the main one."""
    threading.Thread(target=_watchdog.stop, args=("nothing is lost", 75)).start()
    time.sleep(FOR_EVER)


def fail_foreseen() -> None:
    raise RunError("the disk is full")


def refuse() -> None:
    raise InputError("run.yaml", "is wrong", "write another")


def sleep() -> None:
    time.sleep(1.5 * SILENT_SECONDS)


def wait_patiently() -> None:
    """Take long within a block that allows it, after another one in it has ended."""
    with _watchdog.patient("waiting"):
        with _watchdog.patient("saving"):
            pass
        time.sleep(2.5 * SILENT_SECONDS)


def leave_late() -> None:
    """Do nothing in the step; see `train`."""


def train(harm: str, faulty_ranks: set[int]) -> None:
    """Run steps with a collective each; at FAULTY_STEP the faulty ranks call the function
    `harm`."""
    stalls = ("hang", "wait_patiently")
    stalled_seconds = 2 * SILENT_SECONDS if harm in stalls else LIMIT_SECONDS
    global _watchdog
    with process_group(), Watchdog(SILENT_SECONDS, stalled_seconds) as watchdog:
        _watchdog = watchdog
        watchdog.resume_point = "It resumes from step-00000002"
        rank = dist.get_rank()
        for step in range(STEPS):
            watchdog.at(f"in step {step}")
            if step == FAULTY_STEP and rank in faulty_ranks:
                globals()[harm]()
            if harm == "die_under_others":
                dist.all_reduce(torch.ones(4), async_op=True).wait()
            else:
                dist.all_reduce(torch.ones(4))
            print("step", step, flush=True)
        if harm == "leave_late" and rank in faulty_ranks:
            sleep()


@dataclass(frozen=True)
class Ended:
    """How a rank ended; the exit code is negative if a signal ended it."""

    code: int
    pid: int
    stdout: str
    stderr: str


def run_job(folder: Path, processes: int, harm: str, faulty_ranks: Iterable[int]) -> list[Ended]:
    """Train with these ranks until all have ended but the frozen ones, which are then killed."""
    # The server does the slow imports once for all jobs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed"])
    port, faulty = free_port(), set(faulty_ranks)
    ranks = [
        context.Process(
            target=_rank_main,
            args=(folder, rank_environment(rank, processes, port), harm, faulty),
        )
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + LIMIT_SECONDS
    frozen = faulty if harm == "freeze" else set()
    for number, rank in enumerate(ranks):
        if number not in frozen:
            rank.join(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        rank.kill()
        rank.join()
    return [
        Ended(
            rank.exitcode,
            rank.pid,
            (folder / f"{number}.1").read_text(),
            (folder / f"{number}.2").read_text(),
        )
        for number, rank in enumerate(ranks)
    ]


def _rank_main(
    folder: Path, environment: dict[str, str], harm: str, faulty_ranks: set[int]
) -> None:
    os.environ.update(environment)
    for descriptor in (1, 2):
        file = os.open(folder / f"{environment['RANK']}.{descriptor}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    try:
        train(harm, faulty_ranks)
    except (InputError, RunError) as error:
        print(f"megaphase: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
