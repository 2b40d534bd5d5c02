"""Signals that ask a run to save and stop: before a time limit, at a preemption, by hand.

They only leave a note here. The training loop asks for it between two steps, where all ranks can
agree to stop, so that no signal ever interrupts a step, a collective or a save.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes the first stop signal that this process gets while the block runs.

    Those that follow change nothing. The earlier handlers come back at the end. Only the main
    thread may enter the block (Python allows no other to install handlers).
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def received(self) -> str | None:
        """The name of the signal that came first, such as `SIGTERM`; None where none came."""
        return self._received

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # Nothing else is safe here: the main thread may hold any lock.
        if self._received is None:
            self._received = signal.Signals(number).name
