"""Threads that make parts of one output while the main thread shows the progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self, TypeVar

POLL_SECONDS = 0.1

# what is being made, the amount that is done, the total amount
ReportProgress = Callable[[str, int, int], None]
Result = TypeVar("Result")


class _StoppedError(Exception):
    """Raised in a thread whose work is no longer needed."""


class BuildPool:
    """A thread pool whose jobs report with `advance`, and a thread that flushes files to disk.

    When the main thread is interrupted or a job fails, the others stop at their next `advance`.
    """

    def __init__(self, threads: int, progress: ReportProgress) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="plan-builder")
        self.flusher: Executor = ThreadPoolExecutor(1, thread_name_prefix="plan-flusher")
        self._progress = progress
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for pool in (self._pool, self.flusher):
            pool.shutdown(wait=True, cancel_futures=True)

    def advance(self, amount: int) -> None:
        """Report that `amount` more is done; called by jobs several times a second."""
        if self._stop.is_set():
            raise _StoppedError
        with self._lock:
            self._done += amount

    def run(self, what: str, total: int, jobs: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run jobs; calls progress(what, done, total) meanwhile and at the end. Returns the
        results."""
        self._done = 0
        finished: SimpleQueue[Future[Result]] = SimpleQueue()
        futures = [self._pool.submit(job) for job in jobs]
        for future in futures:
            future.add_done_callback(finished.put)
        left = len(futures)
        while left > 0:
            for future in _arrivals(finished, left, POLL_SECONDS):
                future.result()
                left -= 1
            self._progress(what, self._done, total)
        return [future.result() for future in futures]


def _arrivals(
    finished: SimpleQueue[Future[Result]], most: int, seconds: float
) -> Iterator[Future[Result]]:
    """Yield at most `most` jobs that finish within `seconds` seconds."""
    end = time.monotonic() + seconds
    for _ in range(most):
        try:
            yield finished.get(timeout=max(end - time.monotonic(), 0))
        except Empty:
            return
