"""The stacks of all threads, taken by one of them while the others keep running."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from megaphase.fault_tolerance.heartbeat import thread_position
from megaphase.fault_tolerance.stack_dump import all_stacks


def wait_for(event: threading.Event) -> None:
    event.wait(30)


def warté(event: threading.Event) -> None:
    wait_for(event)


def waiting_thread(event: threading.Event) -> int:
    thread = threading.Thread(target=warté, args=(event,), daemon=True)
    thread.start()
    assert thread.ident is not None
    while not any(frame.function == "wait" for frame in all_stacks()[thread.ident]):
        pass
    return thread.ident


def test_every_thread_is_seen_innermost_call_first() -> None:
    event = threading.Event()
    ident = waiting_thread(event)
    stack = all_stacks()[ident]
    functions = [frame.function for frame in stack]
    assert functions[functions.index("wait_for") :][:2] == ["wait_for", "warté"]
    own = next(frame for frame in stack if frame.function == "warté")
    assert own.filename == __file__
    assert own.line == warté.__code__.co_firstlineno + 1
    mine = all_stacks()[threading.get_ident()]
    line = sys._getframe().f_lineno - 1
    assert (__file__, line, "test_every_thread_is_seen_innermost_call_first") in mine
    assert thread_position(ident) == (f"test_stack_dump.py:{line_of(wait_for)} in wait_for", False)
    event.set()


def line_of(function: object) -> int:
    return function.__code__.co_firstlineno + 1  # type: ignore[attr-defined]


# Threads of C enter and leave Python all the time, as gloo's do where they release a tensor.
NATIVE_THREADS = """
import ctypes, threading
from megaphase.fault_tolerance.stack_dump import all_stacks
libc, entered, stop = ctypes.CDLL(None), 0, False
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def enter(argument):
    global entered
    entered += 1
def start():
    while not stop:
        thread = ctypes.c_ulong()
        if libc.pthread_create(ctypes.byref(thread), None, enter, None) == 0:
            libc.pthread_join(thread, None)
starters = [threading.Thread(target=start) for _ in range(4)]
for starter in starters:
    starter.start()
for _ in range(20_000):
    all_stacks()
stop = True
for starter in starters:
    starter.join()
print(entered > 100)
"""


def test_threads_of_c_may_enter_python_meanwhile() -> None:
    """faulthandler.dump_traceback, which reads their list without its lock, crashed at this."""
    done = subprocess.run(
        [sys.executable, "-c", NATIVE_THREADS], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.slow
def test_it_may_be_taken_at_any_moment() -> None:
    """Walking frame objects instead gave freed objects within a minute of this."""
    stop, taken = threading.Event(), 0

    def numbers(count: int) -> Iterator[list[int]]:
        for number in range(count):
            yield [number] * 3

    def recurse(depth: int) -> int:
        if depth == 0:
            return sum(each[0] for each in numbers(20))
        return recurse(depth - 1) + len({n: str(n) for n in range(5)})

    def work() -> None:
        while not stop.is_set():
            assert recurse(15) == 265

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work) for _ in range(5)]
    try:
        for thread in threads:
            thread.start()
        idents = {thread.ident for thread in threads}
        while taken < 200_000:
            assert idents <= all_stacks().keys()
            taken += 1
    finally:
        stop.set()
        sys.setswitchinterval(before)
