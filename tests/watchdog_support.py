"""A small "training" whose ranks meet in an all-reduce each step; one of them comes to harm."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from megaphase.errors import InputError, RunError
from megaphase.parallel.topology import process_group
from megaphase.parallel.watchdog import Watchdog, exit_code

SILENT_SECONDS, STALLED_SECONDS = 2.0, 4.0
FAULTY_STEP, STEPS = 3, 6
FOR_EVER = 600


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


def fail_foreseen() -> None:
    raise RunError("the disk is full")


def refuse() -> None:
    raise InputError("run.yaml", "is wrong", "write another")


def sleep() -> None:
    time.sleep((SILENT_SECONDS + STALLED_SECONDS) / 2)


def nothing() -> None:
    pass


def train(harm: str, faulty_ranks: set[int]) -> None:
    """Steps with a collective each; at FAULTY_STEP the faulty ranks call the function `harm`."""
    with process_group(), Watchdog(SILENT_SECONDS, STALLED_SECONDS) as watchdog:
        rank = dist.get_rank()
        for step in range(STEPS):
            watchdog.at(f"in step {step}")
            if step == FAULTY_STEP and rank in faulty_ranks:
                globals()[harm]()
            dist.all_reduce(torch.ones(4))
            print("step", step, flush=True)


if __name__ == "__main__":
    try:
        train(sys.argv[1], {int(rank) for rank in sys.argv[2:]})
    except (InputError, RunError) as error:
        print(f"megaphase: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
