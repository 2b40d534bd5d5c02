"""How commands handle the signals that ask them to end, once the program has been imported.

Ctrl-C ends a command with exit code 130; SIGTERM and SIGUSR1 end it with 75, since a command that
was stopped from outside may be started again. A command that has something to save, or processes
to supervise, records the signals and handles them itself.
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

# One press of Ctrl-C may reach a process twice: from the terminal and from a launcher.
SAME_PRESS_SECONDS = 0.25
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ALL_SIGNALS = (*STOP_SIGNALS, signal.SIGINT)


def signal_name(number: int) -> str:
    """Return a signal's name for messages: Ctrl-C, SIGTERM."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def exit_code_after(number: int) -> int:
    """Return the exit code of a command that a signal has ended with nothing to save."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE


def unignored_signals() -> list[signal.Signals]:
    """Return the signals that this process was not started to ignore (by a shell's `&` or
    `trap`)."""
    return [number for number in ALL_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block signals while a process is started; both processes receive them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def handlers(numbers: Iterable[signal.Signals], handler: Any) -> Iterator[None]:
    """Handle signals while the block runs, and restore the earlier handlers at its end.

    In a thread other than the main one this does nothing, since Python cannot install handlers
    there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # None means that the handler was not installed from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


@contextlib.contextmanager
def recorded_signals() -> Iterator[list[signal.Signals]]:
    """Record signals to be forwarded to child processes, in their order of arrival."""
    received: list[signal.Signals] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    with handlers(unignored_signals(), note):
        yield received


@contextlib.contextmanager
def interrupting_signals() -> Iterator[list[Interrupted]]:
    """Make signals raise Interrupted in the main thread; yields the list of those raised.

    After the first signal, only another press of Ctrl-C interrupts its handling.
    """
    raised: list[Interrupted] = []
    last = -SAME_PRESS_SECONDS

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if raised and (number != signal.SIGINT or last - before < SAME_PRESS_SECONDS):
            return
        raised.append(Interrupted(signal_name(number), exit_code_after(number)))
        raise raised[-1]

    with handlers(unignored_signals(), interrupt):
        # In a process started by another one, or by itself again, the signals were blocked.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)
        yield raised
