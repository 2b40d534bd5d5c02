"""Worker processes: order, bounds, errors, and no process is left behind in any case."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from data_support import LIMIT_SECONDS, is_running, start_python, wait_until

from megaphase.data_tools.ordered_pool import ordered_map
from megaphase.utils.errors import InputError, RunError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


def slow_first(number: int) -> tuple[int, int]:
    time.sleep(0.2 if number == 0 else 0.0)
    return number, os.getpid()


def fail_at_three(number: int) -> int:
    if number == 2:
        time.sleep(0.2)
    if number == 3:
        raise InputError("here", f"{number} is wrong", "choose another")
    return number


def fail_unexpectedly(number: int) -> int:
    raise ZeroDivisionError(number)


def die_if_told(how: str) -> str:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    return how


def tell_pid(_: int) -> int:
    return os.getpid()


def echo(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers: int) -> None:
    results = list(ordered_map(slow_first, range(30), workers))
    assert [number for number, _ in results] == list(range(30))
    pids = {pid for _, pid in results}
    assert len(pids) <= workers
    assert os.getpid() not in pids
    assert not any(map(is_running, pids))


def test_no_item_gives_no_result() -> None:
    assert list(ordered_map(echo, [], 2)) == []


def test_items_are_taken_only_as_they_are_needed() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    with closing(ordered_map(slow_first, items(), 2)) as results:
        for given, _ in enumerate(results):
            assert taken <= given + 2 * 4
    assert taken == 100


def test_no_more_processes_start_than_there_are_items() -> None:
    pids = list(ordered_map(tell_pid, [0], 8))
    assert len(pids) == 1


def test_large_items_do_not_block_the_pipes() -> None:
    items = [bytes([number]) * 3_000_000 for number in range(8)]
    assert list(ordered_map(echo, items, 2)) == items


def test_an_error_comes_at_its_turn() -> None:
    results = ordered_map(fail_at_three, range(10), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="here: 3 is wrong; choose another"):
        next(results)


def test_an_unexpected_error_says_where_it_happened() -> None:
    with pytest.raises(ZeroDivisionError) as error:
        list(ordered_map(fail_unexpectedly, [7], 1))
    assert "raise ZeroDivisionError(number)" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kill", "a worker process was killed by SIGKILL; memory may have run out"),
        ("exit", r"a worker process ended by itself \(exit code 3\)"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_lost_worker_is_one_clear_line(how: str, message: str, workers: int) -> None:
    with pytest.raises(RunError, match=message):
        list(ordered_map(die_if_told, ["live", "live", how, "live", "live"], workers))


def test_a_worker_killed_while_idle_is_noticed() -> None:
    pids: list[int] = []

    def items() -> Iterator[int]:
        # A worker gets its second item while it processes the first.
        yield from range(2)
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: not is_running(pids[0]))
        yield 2

    def collect() -> None:
        for pid in ordered_map(tell_pid, items(), 1):
            pids.append(pid)

    with pytest.raises(RunError, match="killed by SIGKILL"):
        collect()
    assert set(pids) == {pids[0]}


def test_stopping_early_ends_the_processes() -> None:
    with closing(ordered_map(tell_pid, range(100), 2)) as results:
        pids = {next(results), next(results)}
        assert all(map(is_running, pids))
    assert not any(map(is_running, pids))


def test_an_error_in_the_items_ends_the_processes() -> None:
    pids: list[int] = []

    def items() -> Iterator[int]:
        yield from range(20)
        raise InputError("", "the items are wrong")

    with pytest.raises(InputError, match="the items are wrong"):
        pids.extend(ordered_map(tell_pid, items(), 2))
    assert not any(map(is_running, pids))


SUPPORT = Path(__file__).resolve().parents[1] / "support"
# A main process whose workers write their pids to a folder and are then busy for long.
BUSY_MAIN = """if True:
    import sys
    sys.path.insert(0, sys.argv[1])
    from busy_worker import be_busy
    from megaphase.data_tools.ordered_pool import ordered_map
    if __name__ == "__main__":
        list(ordered_map(be_busy, [sys.argv[2]] * 2, 2))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_the_main_process(tmp_path: Path, how: signal.Signals) -> None:
    main = start_python(BUSY_MAIN, SUPPORT, tmp_path)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    if how == signal.SIGINT:
        # Like a terminal: to every process of the group.
        os.killpg(main.pid, how)
    else:
        main.send_signal(how)
    _, errors = main.communicate(timeout=LIMIT_SECONDS)
    assert main.returncode == -how
    wait_until(lambda: not any(map(is_running, pids)))
    assert errors.count("Traceback") == (how == signal.SIGINT)
