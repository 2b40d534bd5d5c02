"""A small "training" whose ranks meet in an all-reduce each step; one of them comes to harm."""

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

# A rank's end makes torch's own threads talk; the command line quiets them in the same way.
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
# Generous: a loaded machine must not fail a test.
LIMIT_SECONDS = 90.0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    time.sleep(FOR_EVER)


def work_in_c() -> None:
    """One call into C that keeps Python's lock for more than SILENT_SECONDS."""
    began = time.monotonic()
    sum(range(trial := 10_000_000))
    trial_seconds = time.monotonic() - began
    sum(range(int(trial * 1.6 * SILENT_SECONDS / trial_seconds)))


def fail() -> None:
    raise ValueError("out of cheese\nand of bread")


def fail_in_a_collective() -> None:
    """It looks as if another rank had died, but none has."""
    dist.all_reduce(torch.ones(4).to_sparse(), op=dist.ReduceOp.MAX)


def interrupt() -> None:
    raise Interrupted("SIGTERM", 75)


def die_under_others() -> None:
    """The others see it in an error that no frame of a collective is part of."""
    die()


def exit() -> None:
    """As a library might."""
    sys.exit(0)


def stop() -> None:
    """Another thread ends the run; the main one never knows."""
    threading.Thread(target=_watchdog.stop, args=("nothing is lost", 75)).start()
    time.sleep(FOR_EVER)


def fail_foreseen() -> None:
    raise RunError("the disk is full")


def refuse() -> None:
    raise InputError("run.yaml", "is wrong", "write another")


def sleep() -> None:
    time.sleep(1.5 * SILENT_SECONDS)


def leave_late() -> None:
    """Nothing happens in the step; see `train`."""


def train(harm: str, faulty_ranks: set[int]) -> None:
    """Steps with a collective each; at FAULTY_STEP the faulty ranks call the function `harm`."""
    stalled_seconds = 2 * SILENT_SECONDS if harm == "hang" else LIMIT_SECONDS
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
    """What became of a rank; the exit code is negative where a signal ended it."""

    code: int
    pid: int
    stdout: str
    stderr: str


def run_job(folder: Path, processes: int, harm: str, faulty_ranks: Iterable[int]) -> list[Ended]:
    """Train on so many ranks, until all have ended that are not frozen; those are killed then."""
    # The server imports once, for all jobs, what takes long.
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
