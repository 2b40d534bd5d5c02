"""Signals that ask a run to save and stop: before a time limit, at a preemption, by hand.

While a run starts, it has nothing to save and a signal ends it at once. During training, a signal
is only recorded. The training loop checks for it between two steps, where all ranks can agree to
stop, so a signal never interrupts a step, a collective or a save. A second Ctrl-C ends the run at
once.
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
    exit_code_after,
    handlers,
    signal_name,
    unignored_signals,
)

# How much later than the terminal's a Ctrl-C forwarded by a launcher may arrive.
HANDED_DOWN_SECONDS = 1.5

BEFORE_TRAINING = (
    "{name} came to rank {rank} before the first step: nothing is lost, the same command starts "
    "again"
)
MEASURING = "stopped by {name}"

End = Callable[[str, int], None]
"""Ends all processes of a run, with a message and an exit code."""


def _say(text: str) -> None:
    """Write a line immediately, whatever locks the main thread holds, and over a progress bar."""
    clear = "\r\x1b[2K" if os.isatty(2) else ""
    os.write(2, f"{clear}megaphase: {text}\n".encode(errors="replace"))


def _end_alone(reason: str, code: int) -> NoReturn:
    # If a launcher ends a rank because another has died, the launcher has already reported it.
    if global_rank() == 0 and not report_end(None, [f"megaphase: {reason}"]):
        _say(reason)
    os._exit(code)


class StopSignals:
    """Handles the stop signals of this process while the block runs.

    A thread receives them immediately, even if the main thread is inside a library. Until
    `begin_training`, a signal ends the run; afterwards the first one is recorded, and later ones
    have no effect except Ctrl-C. The earlier handlers are restored at the end. Only the main thread
    may enter the block, since Python cannot install handlers in others.
    """

    def __init__(self, reason: str = BEFORE_TRAINING) -> None:
        """reason: the message for a run with nothing to save; `name` and `rank` are filled in."""
        self._reason = reason
        self._received: str | None = None
        self._pressed: float | None = None
        self._end: End = _end_alone
        self._loss: Callable[[], str] | None = None
        self._lock = threading.Lock()
        self._stack = ExitStack()

    @property
    def received(self) -> str | None:
        """The name of the first signal received, such as `SIGTERM`; None if there was none."""
        return self._received

    def ends_with(self, end: End) -> None:
        """Use `end` for a signal while the run starts, so that all ranks end together."""
        self._end = end

    def begin_training(self, loss: Callable[[], str]) -> None:
        """From now on record signals; `loss` describes what is lost if the run ends at once."""
        with self._lock:
            self._loss = loss

    def __enter__(self) -> Self:
        numbers = dict.fromkeys((*STOP_SIGNALS, *unignored_signals()))
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._stack.enter_context(handlers(numbers, self._note))
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._stack.callback(os.close, write)  # this ends the thread
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
        # Nothing else is safe in a handler: the main thread may hold any lock.
        if self._received is None:
            self._received = signal_name(number)

    def _watch(self, descriptor: int) -> None:
        with open(descriptor, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    self._came(number)

    def _came(self, number: int) -> None:
        self._note(number, None)
        with self._lock:
            if self._loss is None:
                reason = self._reason.format(name=signal_name(number), rank=global_rank())
                self._end(reason, exit_code_after(number))
            elif number == signal.SIGINT:
                self._press(self._loss)

    def _press(self, loss: Callable[[], str]) -> None:
        """Handle Ctrl-C: the first one saves, the second ends the run, unless its launcher does."""
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
