"""Signals that ask a run to save and stop: before a time limit, at a preemption, by hand.

While a run starts it has nothing to save: they end it at once. Once it trains they only leave a
note here. The training loop asks for it between two steps, where all ranks can agree to stop, so
that no signal ever interrupts a step, a collective or a save. A second Ctrl-C ends it at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import NoReturn, Self

from megaphase.distributed.dist_env import (
    global_rank,
    is_launched_locally,
    report_end,
    world_size,
)
from megaphase.utils.errors import EXIT_INTERRUPTED
from megaphase.utils.signals import (
    SAME_PRESS_SECONDS,
    STOP_SIGNALS,
    code_after,
    handlers,
    heeded_signals,
    told_name,
)

# Of a launcher that hands Ctrl-C down: how much later than from the terminal it may come.
HANDED_DOWN_SECONDS = 1.5

BEFORE_TRAINING = (
    "{name} came to rank {rank} before the first step: nothing is lost, the same command begins "
    "again"
)
MEASURING = "stopped by {name}"

End = Callable[[str, int], None]
"""Ends all processes of a run, with a line and an exit code."""


def _say(text: str) -> None:
    """Write a line at once, whatever the main thread holds; over a bar that a terminal shows."""
    clear = "\r\x1b[2K" if os.isatty(2) else ""
    os.write(2, f"{clear}megaphase: {text}\n".encode(errors="replace"))


def _end_alone(reason: str, code: int) -> NoReturn:
    # A launcher that ends a rank because another has died has said so, and says no more.
    if global_rank() == 0 and not report_end(None, [f"megaphase: {reason}"]):
        _say(reason)
    os._exit(code)


class StopSignals:
    """Takes the stop signals that this process gets while the block runs.

    A thread sees them at once, even where the main one waits in a library: at first it ends the
    run, from `begin_training` on the first is noted and those that follow change nothing, but for
    Ctrl-C. The earlier handlers come back at the end. Only the main thread may enter the block
    (Python allows no other to install handlers).
    """

    def __init__(self, reason: str = BEFORE_TRAINING) -> None:
        """reason: why a run ends that has nothing to save; `name` and `rank` are filled in."""
        self._reason = reason
        self._received: str | None = None
        self._pressed: float | None = None
        self._end: End = _end_alone
        self._loss: Callable[[], str] | None = None
        self._lock = threading.Lock()
        self._stack = ExitStack()

    @property
    def received(self) -> str | None:
        """The name of the signal that came first, such as `SIGTERM`; None where none came."""
        return self._received

    def ends_with(self, end: End) -> None:
        """While the run starts, let a signal end it in this way: on all ranks together."""
        self._end = end

    def begin_training(self, loss: Callable[[], str]) -> None:
        """From now on signals are noted; `loss` says what is lost if the run ends at once."""
        with self._lock:
            self._loss = loss

    def __enter__(self) -> Self:
        numbers = dict.fromkeys((*STOP_SIGNALS, *heeded_signals()))
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._stack.enter_context(handlers(numbers, self._note))
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._stack.callback(os.close, write)  # which ends the thread
        self._stack.callback(signal.set_wakeup_fd, before)
        threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # Nothing else is safe here: the main thread may hold any lock.
        if self._received is None:
            self._received = told_name(number)

    def _watch(self, descriptor: int) -> None:
        with open(descriptor, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    self._came(number)

    def _came(self, number: int) -> None:
        self._note(number, None)
        with self._lock:
            if self._loss is None:
                reason = self._reason.format(name=told_name(number), rank=global_rank())
                self._end(reason, code_after(number))
            elif number == signal.SIGINT:
                self._press(self._loss)

    def _press(self, loss: Callable[[], str]) -> None:
        """Ctrl-C: the first saves, and the second ends the run, unless its launcher does that."""
        now, before = time.monotonic(), self._pressed
        if before is None:
            self._pressed = now
            if global_rank() == 0:
                _say("saving after this step; press Ctrl-C again to end at once")
            return
        same_press = HANDED_DOWN_SECONDS if world_size() > 1 else SAME_PRESS_SECONDS
        if not is_launched_locally() and now - before > same_press:
            if global_rank() == 0:
                _say(f"ended at once: {loss()}")
            os._exit(EXIT_INTERRUPTED)
