"""Detects a rank that dies, freezes or hangs, reports it, and ends the whole run.

Collectives do not report this: NCCL waits for a dead rank until its timeout, and gloo reports a
closed connection. Here a thread of every rank sends heartbeats to rank 0, which compares them
(`FaultDetector`) and tells the other ranks how the run ends. The watchdog has its own store, so
that it shares no lock with the collectives, and never uses the device.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn, Self

from megaphase.distributed.dist_env import global_rank, report_end
from megaphase.distributed.lost_connection import is_collective_error
from megaphase.fault_tolerance.fault_detector import (
    CHECKS_UNTIL_GONE,
    GONE,
    SILENT,
    Diagnosis,
    host_lost,
)
from megaphase.fault_tolerance.heartbeat import (
    Heartbeat,
    Neighbour,
    State,
    thread_position,
)
from megaphase.fault_tolerance.heartbeat_transport import (
    LocalTransport,
    MemberTransport,
    open_transport,
)
from megaphase.utils.errors import (
    EXIT_FAILED,
    InputError,
    Interrupted,
    RunError,
    Stopped,
    exit_code,
)

LONGEST_INTERVAL_SECONDS = 1.0
FLUSH_SECONDS = 1.0
REASON_CHARACTERS = 400


def say_on_stderr(text: str) -> None:
    """Write a line without Python's buffers, whose locks a blocked main thread may hold."""
    os.write(2, f"{text}\n".encode(errors="replace"))


class Watchdog:
    """Guards the block that it surrounds; all ranks enter it together, in a joined process group.

    Detects within `silent_seconds` that a rank is dead or frozen (at once if another rank on its
    node sees that the process is gone), and within `stalled_seconds` that no rank makes progress.
    One rank then reports which one it was, and every process ends with exit code 1. An exception
    that leaves the block on one rank ends the others too. One that all ranks share (InputError,
    RunError, Stopped) leaves the block on all of them.

    Attributes:
        resume_point: a sentence appended to the report of a fault: from where the same command
            resumes. Set by the training loop.
    """

    def __init__(self, silent_seconds: float, stalled_seconds: float) -> None:
        self._silent_seconds, self._stalled_seconds = silent_seconds, stalled_seconds
        self.resume_point = ""
        self._stopped: tuple[str, int] | None = None
        self._interval = min(LONGEST_INTERVAL_SECONDS, silent_seconds / 5)
        self._counter = self._progress = 0
        self._where = "at the start"
        self._state: State = "running"
        self._reason, self._exit_code = "", EXIT_FAILED
        self._wake, self._over = threading.Event(), threading.Event()
        self._ending = threading.Lock()

    def at(self, where: str) -> None:
        """Report what this rank does now, such as `in step 12` or `saving step 12`; almost free.

        All ranks call it at the same points; a rank that is behind the others is reported.
        """
        self._where = where
        self._progress += 1

    @contextlib.contextmanager
    def patient(self, where: str) -> Iterator[None]:
        """Allow the block to take longer than `stalled_seconds`; a dead rank is still detected.
        Blocks may be nested."""
        self.at(where)
        before, self._state = self._state, "patient"
        try:
            yield
        finally:
            self._state = before
            self.at(f"after {where}")

    def stop(self, reason: str, code: int) -> None:
        """End all processes at once with an exit code; may be called in any thread of any rank.

        For a run that has nothing to save. reason: the reported line.
        """
        if self._over.is_set():
            _exit(code)
        self._stopped = reason, code
        self._wake.set()

    def __enter__(self) -> Self:
        self._main = threading.get_ident()
        self._rank = global_rank()
        self._transport, self._places = open_transport(self._silent_seconds, self._stalled_seconds)
        self._neighbour = Neighbour(self._rank, self._places)
        self._thread = threading.Thread(target=self._send_heartbeats, name="watchdog", daemon=True)
        self._thread.start()
        if isinstance(self._transport, MemberTransport):
            guard = threading.Thread(
                target=self._guard_host,
                args=(self._transport,),
                name="watchdog-of-rank-0",
                daemon=True,
            )
            guard.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        exited = error if isinstance(error, SystemExit) else None
        if exited is not None:
            # Nothing in a run ends its process in this way, except a library.
            traceback.print_exception(exited)
            error = RunError(f"a library ended the process {self._where} (SystemExit: {exited})")
        if isinstance(self._transport, LocalTransport):
            self._leave("left")
        elif isinstance(error, InputError | RunError | Stopped):
            self._leave("fault", str(error), exit_code(error))
        elif isinstance(error, Interrupted):
            self._leave("interrupted", f"stopped by {error.name}", error.exit_code)
        elif isinstance(error, Exception):
            self._fail(error)
        else:
            self._leave("left")
        if exited is not None and error is not None:
            raise error from None

    def _leave(self, state: State, reason: str = "", code: int = EXIT_FAILED) -> None:
        """Send the state and wait until this rank may leave: rank 0, which has the store, is
        last."""
        self._reason, self._exit_code = reason, code
        self._state = state
        self._wake.set()
        self._over.wait()
        self._thread.join(self._silent_seconds)  # with a frozen rank 0 it never ends

    def _fail(self, error: Exception) -> None:
        """End all processes on an unexpected error, after printing its traceback.

        If the error may only be a consequence of another rank's death, wait for that diagnosis
        first.
        """
        if isinstance(error, RuntimeError):
            self._state = "broken"
            # Rank 0 knows by then, and says so at its next beat; this process ends with that.
            seconds = (CHECKS_UNTIL_GONE + 4) * self._interval
            if is_collective_error(error):
                seconds = max(seconds, self._silent_seconds + 4 * self._interval)
            if self._over.wait(seconds):
                return
        traceback.print_exception(error)
        self._leave("failed", _one_line(error))

    def _send_heartbeats(self) -> None:
        try:
            self._heartbeat_loop()
        except Exception:
            # Without this thread the rank would count as dead, and its main thread wait forever.
            traceback.print_exc()
            _exit(EXIT_FAILED)

    def _heartbeat_loop(self) -> None:
        before = time.monotonic()
        while True:
            now = time.monotonic()
            # Time in which the whole job is suspended does not count as silence.
            seconds, before = min(now - before, 2 * self._interval), now
            state = "interrupted" if self._stopped else self._state
            try:
                diagnosis = self._transport.exchange(self._next_beat(state), seconds)
            except RuntimeError:
                diagnosis = self._end_without_host(state, GONE)
            if diagnosis is not None and diagnosis.ends:
                self._end_with_all(diagnosis)
            if diagnosis is not None or (state == "left" and self._rank > 0):
                self._over.set()
                return
            self._wake.wait(self._interval)
            self._wake.clear()

    def _next_beat(self, state: State) -> Heartbeat:
        self._counter += 1
        code, waits = thread_position(self._main)
        reason, exit_code = self._stopped or (self._reason, self._exit_code)
        return Heartbeat(
            counter=self._counter,
            progress=self._progress,
            where=self._where,
            code=code,
            waits=waits,
            neighbour=self._neighbour.ticks(),
            state=state,
            reason=reason,
            exit_code=exit_code,
        )

    def _guard_host(self, transport: MemberTransport) -> None:
        """Detect a frozen rank 0: its store then accepts heartbeats but never answers."""
        answers, unanswered, before = transport.answers, 0.0, time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            unanswered += min(now - before, 2 * self._interval)
            before = now
            if transport.answers != answers:
                answers, unanswered = transport.answers, 0.0
            elif unanswered >= self._silent_seconds:
                self._end_without_host(self._state, SILENT.format(seconds=unanswered))
                self._over.set()

    def _end_with_all(self, diagnosis: Diagnosis) -> NoReturn:
        """End this process as rank 0 has decided, whatever its main thread is doing."""
        if self._rank == 0:
            self._report(diagnosis)
        # Rank 0 reports before the first process ends, because launchers then kill the others.
        with contextlib.suppress(RuntimeError):
            self._transport.end(diagnosis, 3 * self._interval)
        _exit(diagnosis.exit_code)

    def _end_without_host(self, state: State, how: str) -> Diagnosis:
        """End this process because rank 0 does not answer, unless both have already left."""
        if state in ("left", "fault"):
            return Diagnosis(ends=False)
        assert isinstance(self._transport, MemberTransport)
        with self._ending:  # two threads may detect it
            diagnosis = host_lost(self._places[0], self._transport.host_heartbeat, how)
            if self._reports_for_host():
                self._report(diagnosis)
            _exit(diagnosis.exit_code)

    def _reports_for_host(self) -> bool:
        """Return whether this rank reports for rank 0: rank 1, or one on a node that is not
        lost."""
        lost = self._places[0].host
        elsewhere = (rank for rank, place in enumerate(self._places) if place.host != lost)
        return self._rank in (1, next(elsewhere, 1))

    def _report(self, diagnosis: Diagnosis) -> None:
        if not diagnosis.message:
            return
        message = diagnosis.message
        if diagnosis.unfinished and self.resume_point:
            message = f"{message}. {self.resume_point}"
        lines = [*(f"  {line}" for line in diagnosis.details), f"megaphase: {message}"]
        if not report_end(diagnosis.rank, lines):
            for line in lines:
                say_on_stderr(line)


def _one_line(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}"[:REASON_CHARACTERS]


def _exit(code: int) -> NoReturn:
    """End the process at once, after flushing its output if no lock prevents that."""
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(FLUSH_SECONDS)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
