"""Worker processes whose results come back in the order of their inputs.

The standard library's pools take the whole input at once, leave their workers behind when the main
process is killed, or hang when a worker is; this one does none of it.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from typing import Any, TypeVar

from megaphase.utils.errors import RunError
from megaphase.utils.signals import (
    ALL_SIGNALS,
    handlers,
    heeded_signals,
    signals_blocked,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

# Results that wait for their turn, a worker: enough to ride out one slow item.
_IN_FLIGHT_PER_WORKER = 4
# The one that a worker has in hand, and the next.
_ITEMS_PER_WORKER = 2


def ordered_map(
    task: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield `task(item)` for every item, in the order of the items, computed in other processes.

    Args:
        task: pickled once for each process.
        items: taken as workers become free; at most four a worker are in flight.
        workers: most processes to start. One is only started when it has something to do.

    Raises what a task raises, at its item's turn, and RunError where a process is killed. Whatever
    ends the iteration also ends the processes; they end by themselves when this one is killed.
    """
    if workers < 1:
        raise ValueError(f"workers: {workers}")
    pool = _Pool(task, workers)
    numbered = enumerate(items)
    results: dict[int, tuple[bool, Any]] = {}
    sent = given = 0
    try:
        while True:
            while sent - given < workers * _IN_FLIGHT_PER_WORKER and pool.has_room():
                entry = next(numbered, None)
                if entry is None:
                    break
                pool.send(entry)
                sent += 1
            if given == sent:
                return
            for number, succeeded, value in pool.receive():
                results[number] = (succeeded, value)
            while given in results:
                succeeded, value = results.pop(given)
                if not succeeded:
                    raise value
                given += 1
                yield value
    finally:
        pool.stop()


class _Worker:
    """One process and the pipe to it.

    A thread of the process takes items from the pipe as they come, so that the next one is there
    when one is done, and so that neither side is ever blocked in a full pipe for good.
    """

    def __init__(self, task: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, task), daemon=True)
        self.items = 0
        with _interrupt_deferred():
            self.process.start()
        # So that the pipe ends when the process does.
        theirs.close()

    def died(self) -> RunError:
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return RunError(f"a worker process ended by itself (exit code {code})")
        name = signal.Signals(-code).name
        hint = "; memory may have run out" if name == "SIGKILL" else ""
        return RunError(f"a worker process was killed by {name}{hint}")


class _Pool:
    def __init__(self, task: Callable[[Any], Any], most_workers: int) -> None:
        self._task = task
        self._most_workers = most_workers
        self._workers: list[_Worker] = []

    def has_room(self) -> bool:
        if len(self._workers) < self._most_workers:
            return True
        return any(worker.items < _ITEMS_PER_WORKER for worker in self._workers)

    def send(self, entry: tuple[int, Any]) -> None:
        worker = min(self._workers, key=lambda worker: worker.items, default=None)
        if worker is None or (worker.items and len(self._workers) < self._most_workers):
            worker = _Worker(self._task)
            self._workers.append(worker)
        worker.items += 1
        try:
            worker.pipe.send(entry)
        except OSError:
            raise worker.died() from None

    def receive(self) -> list[tuple[int, bool, Any]]:
        """Wait until at least one worker has a result."""
        replies = []
        busy = [worker for worker in self._workers if worker.items]
        ready = connection.wait([worker.pipe for worker in busy])
        for worker in [worker for worker in busy if worker.pipe in ready]:
            try:
                replies.append(worker.pipe.recv())
            except (EOFError, OSError):
                raise worker.died() from None
            worker.items -= 1
        return replies

    def stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()


def _work(pipe: connection.Connection, task: Callable[[Any], Any]) -> None:
    # What reaches every process of a terminal or a job: the main one stops the others.
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    items: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_take_items, args=(pipe, items), daemon=True).start()
    # The pipe ends when the main process has gone.
    with suppress(BrokenPipeError, ConnectionResetError):
        while entry := items.get():
            number, item = entry
            try:
                reply = (number, True, task(item))
            except Exception as error:
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
                reply = (number, False, error)
            pipe.send(reply)


def _take_items(
    pipe: connection.Connection, items: queue.SimpleQueue[tuple[int, Any] | None]
) -> None:
    with suppress(EOFError, ConnectionResetError):
        while True:
            items.put(pipe.recv())
    items.put(None)


def _end_with_main_process() -> None:
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    main_process.join()
    os._exit(1)


@contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Hold signals back while a process starts: half started, either side would print a traceback.

    They are blocked for the new process, which inherits that, and noted in this one, where another
    thread may receive them all the same.
    """
    # The tracker unblocks Ctrl-C and SIGTERM when it starts, so it must run before.
    resource_tracker.ensure_running()
    noted: list[signal.Signals] = []
    with (
        handlers(heeded_signals(), lambda number, _: noted.append(signal.Signals(number))),
        signals_blocked(),
    ):
        yield
    if noted:
        signal.raise_signal(noted[0])
