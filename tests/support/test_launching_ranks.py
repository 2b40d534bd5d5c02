"""The launcher of the distributed tests names the failed rank and leaves no process behind."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
from distributed import LaunchError, RunningRanks, check, launch, once, run_ranks


def who() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names} | {"pid": str(os.getpid())}


def fail_at(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        raise ValueError("out of cheese")
    time.sleep(0.2)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_rank_runs_the_function_in_its_own_process() -> None:
    ranks = run_ranks(who, 3)
    assert [each["RANK"] for each in ranks] == ["0", "1", "2"]
    assert {each["WORLD_SIZE"] for each in ranks} == {"3"}
    assert len({each["pid"] for each in ranks}) == 3


def test_failing_rank_is_named_with_its_error() -> None:
    with pytest.raises(LaunchError, match="rank 1 ended with 1") as failure:
        run_ranks(fail_at, 3, 1)
    assert "out of cheese" in str(failure.value)
    assert "rank 0" not in str(failure.value)


def test_exit_codes_and_output_come_back_as_they_are() -> None:
    code = "import os, sys; print('hello', file=sys.stderr); sys.exit(7 * int(os.environ['RANK']))"
    results = launch(python(code), 2)
    assert [each.returncode for each in results] == [0, 7]
    assert [each.stderr for each in results] == ["hello\n", "hello\n"]
    with pytest.raises(LaunchError, match="rank 1 ended with 7"):
        check(results)


def test_time_limit_ends_all_ranks() -> None:
    code = "import sys, time; print('stuck', file=sys.stderr, flush=True); time.sleep(600)"
    with RunningRanks(python(code), 2) as ranks:
        ranks.wait_for(lambda: all(ranks.result(rank).stderr == "stuck\n" for rank in range(2)))
        with pytest.raises(LaunchError, match="stuck"):
            ranks.wait(timeout=0.1)
        assert [each.wait() for each in ranks.processes] == [-signal.SIGKILL] * 2


def test_failed_launch_is_not_tried_again() -> None:
    tried = []

    @once
    def start(processes: int) -> None:
        tried.append(processes)
        raise LaunchError("rank 0 ended with 1")

    for _ in range(2):
        with pytest.raises(LaunchError, match="rank 0"):
            start(1)
    assert tried == [1]
