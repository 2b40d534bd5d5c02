"""On real ranks: a rank that dies, freezes, hangs or fails is named once, and all processes end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from data_support import LIMIT_SECONDS
from watchdog_support import FAULTY_STEP, STEPS, Ended, run_job

from megaphase.launch.local import free_port, rank_environment

pytestmark = pytest.mark.distributed

HOST = socket.gethostname()
GOES_ON = "all processes end. It resumes from step-00000002"


def name(rank: int, ended: list[Ended]) -> str:
    return f"rank {rank} on {HOST} (process {ended[rank].pid})"


def said(ended: list[Ended]) -> str:
    """Return the one line that all ranks together have printed."""
    lines = [line for rank in ended for line in rank.stderr.splitlines()]
    assert len(lines) == 1, lines
    return lines[0]


def check_survivors(ended: list[Ended], rank: int, code: int = 1) -> None:
    assert [each.code for number, each in enumerate(ended) if number != rank] == [code] * (
        len(ended) - 1
    )
    assert {len(each.stdout.splitlines()) for each in ended} == {FAULTY_STEP}


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank(rank: int, tmp_path: Path) -> None:
    ended = run_job(tmp_path, 3, "die", [rank])
    message = said(ended)
    assert message.startswith(f"megaphase: {name(rank, ended)} has ended without a word")
    assert message.endswith(GOES_ON)
    assert ended[0 if rank else 1].stderr
    check_survivors(ended, rank)
    assert ended[rank].code == -signal.SIGKILL


@pytest.mark.parametrize("rank", [0, 2])
def test_frozen_rank(rank: int, tmp_path: Path) -> None:
    ended = run_job(tmp_path, 3, "freeze", [rank])
    message = said(ended)
    start = re.escape(f"megaphase: {name(rank, ended)} gave no sign of life for ")
    assert re.match(rf"{start}\d+ s, last seen ", message), message
    assert message.endswith(GOES_ON)
    check_survivors(ended, rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_hanging_rank(rank: int, tmp_path: Path) -> None:
    ended = run_job(tmp_path, 3, "hang", [rank])
    message = said(ended)
    assert message.startswith("megaphase: no rank has made progress for ")
    assert f": {name(rank, ended)} hangs in step {FAULTY_STEP} (watchdog_support.py:" in message
    assert message.endswith(f" in hang); {GOES_ON}")
    check_survivors(ended, rank)
    assert ended[rank].code == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_failing_rank(rank: int, tmp_path: Path) -> None:
    ended = run_job(tmp_path, 2, "fail", [rank])
    message = ended[0].stderr.splitlines()[-1]
    assert message == (
        f"megaphase: {name(rank, ended)} failed in step {FAULTY_STEP}: "
        f"ValueError: out of cheese; {GOES_ON}"
    )
    assert "Traceback" in ended[rank].stderr
    assert "and of bread" in ended[rank].stderr
    assert [each.stderr.count("Traceback") for each in ended] == [
        int(number == rank) for number in range(2)
    ]
    check_survivors(ended, rank)
    assert ended[rank].code == 1


def test_failing_collective_is_told_where_no_rank_has_died(tmp_path: Path) -> None:
    ended = run_job(tmp_path, 2, "fail_in_a_collective", [1])
    message = ended[0].stderr.splitlines()[-1]
    assert message.startswith(f"megaphase: {name(1, ended)} failed in step {FAULTY_STEP}: Runtime")
    assert "Traceback" in ended[1].stderr
    assert [each.code for each in ended] == [1, 1]


@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_a_broken_connection_does_not_blame_the_rank_that_sees_it(
    rank: int, tmp_path: Path
) -> None:
    ended = run_job(tmp_path, 3, "die_under_others", [rank])
    message = said(ended)
    assert message.startswith(f"megaphase: {name(rank, ended)} has ended without a word")
    check_survivors(ended, rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_library_that_ends_the_process_is_told(rank: int, tmp_path: Path) -> None:
    ended = run_job(tmp_path, 2, "exit", [rank])
    assert ended[0].stderr.splitlines()[-1] == (
        f"megaphase: {name(rank, ended)}: a library ended the process in step {FAULTY_STEP} "
        "(SystemExit: 0)"
    )
    assert [each.stderr.count("Traceback") for each in ended] == [
        int(number == rank) for number in range(2)
    ]
    check_survivors(ended, rank)
    assert ended[rank].code == 1


def test_library_that_ends_the_only_process_is_told(tmp_path: Path) -> None:
    [ended] = run_job(tmp_path, 1, "exit", [0])
    assert ended.code == 1
    assert ended.stderr.splitlines()[-1] == (
        f"megaphase: a library ended the process in step {FAULTY_STEP} (SystemExit: 0)"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_interrupted_rank_ends_all(rank: int, tmp_path: Path) -> None:
    ended = run_job(tmp_path, 2, "interrupt", [rank])
    assert said(ended) == "megaphase: stopped by SIGTERM"
    assert [each.code for each in ended] == [75] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_from_another_thread_all_end_at_once(rank: int, tmp_path: Path) -> None:
    ended = run_job(tmp_path, 2, "stop", [rank])
    assert said(ended) == "megaphase: nothing is lost"
    assert [each.code for each in ended] == [75] * 2


def test_processes_that_never_come_are_told(tmp_path: Path) -> None:
    code = (
        "from datetime import timedelta\n"
        "from megaphase.distributed import process_grid\n"
        "process_grid.JOIN_TIMEOUT = timedelta(seconds=1)\n"
        "process_grid.join_processes()\n"
    )
    environment = {**os.environ, **rank_environment(0, 2, free_port())}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 1
    assert "RunError: the 2 processes have not found each other at 127.0.0.1:" in done.stderr


def test_foreseen_fault_of_one_rank_ends_all(tmp_path: Path) -> None:
    ended = run_job(tmp_path, 2, "refuse", [1])
    assert said(ended) == f"megaphase: {name(1, ended)}: run.yaml: is wrong; write another"
    assert [each.code for each in ended] == [2, 2]


def test_foreseen_fault_of_all_is_theirs_to_tell(tmp_path: Path) -> None:
    ended = run_job(tmp_path, 2, "fail_foreseen", [0, 1])
    assert [each.stderr for each in ended] == ["megaphase: the disk is full\n"] * 2
    assert [each.code for each in ended] == [1, 1]


@pytest.mark.parametrize(
    ("harm", "ranks"),
    [
        ("work_in_c", [1]),
        ("wait_patiently", [1]),
        ("leave_late", [0]),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("work_in_c", [0]), ("sleep", [1]), ("leave_late", [1]))
        ),
    ],
)
def test_slow_is_not_dead(harm: str, ranks: list[int], tmp_path: Path) -> None:
    ended = run_job(tmp_path, 2, harm, ranks)
    assert [(each.code, each.stderr) for each in ended] == [(0, "")] * 2
    assert {len(each.stdout.splitlines()) for each in ended} == {STEPS}
