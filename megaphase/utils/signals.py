"""What a command does with the signals that ask it to end, once the program has been imported.

Ctrl-C ends a command with exit code 130, SIGTERM and SIGUSR1 end it with 75: what was stopped from
outside may be started again. A command that has something to save, or processes to look after,
notes the signals and acts on them by itself.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from megaphase.utils.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, Interrupted

# A press of Ctrl-C may reach a process twice: from the terminal, and from a launcher between.
SAME_PRESS_SECONDS = 0.25
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ALL_SIGNALS = (*STOP_SIGNALS, signal.SIGINT)


def told_name(number: int) -> str:
    """What a signal is called in messages: Ctrl-C, SIGTERM."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def code_after(number: int) -> int:
    """The exit code of a command that a signal has ended, with nothing to save."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE


def heeded_signals() -> list[signal.Signals]:
    """The signals that this process was not started to ignore (as by a shell's `&` or `trap`)."""
    return [number for number in ALL_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """While a process is started: it, and this one, get what comes as soon as they can take it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def handlers(numbers: Iterable[signal.Signals], handler: Any) -> Iterator[None]:
    """Handle signals while the block runs; the earlier handlers come back at its end.

    In another thread than the main one nothing is changed: Python lets none install handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[signal.Signals]]:
    """The signals to hand down to processes, in the order in which they come."""
    received: list[signal.Signals] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    with handlers(heeded_signals(), note):
        yield received


@contextlib.contextmanager
def interrupting_signals() -> Iterator[list[Interrupted]]:
    """Signals raise Interrupted in the main thread; yields those that were raised.

    Only another press of Ctrl-C disturbs what the first signal has set going.
    """
    raised: list[Interrupted] = []
    last = -SAME_PRESS_SECONDS

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if raised and (number != signal.SIGINT or last - before < SAME_PRESS_SECONDS):
            return
        raised.append(Interrupted(told_name(number), code_after(number)))
        raise raised[-1]

    with handlers(heeded_signals(), interrupt):
        # A process that another one starts, or that starts itself again, has had them blocked.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)
        yield raised
