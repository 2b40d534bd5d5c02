"""Worker processes whose results come back in the order of their inputs.

Unlike the standard library's pools, this one reads the input as workers become free, ends its
workers when the main process is killed, and raises an error when a worker is killed.
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
    signals_blocked,
    unignored_signals,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

# Finished results that may wait for an earlier item, per worker: enough to absorb one slow item.
_IN_FLIGHT_PER_WORKER = 4
# The item that a worker is processing, and the next one.
_ITEMS_PER_WORKER = 2


def ordered_map(
    task: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    with_children: bool = False,
) -> Generator[Result, None, None]:
    """Yield `task(item)` for every item, in the order of the items, computed in other processes.

    Args:
        Args:
            task: called in the worker processes; pickled once per process.
            items: consumed as workers become free; at most four per worker are in flight.
            workers: the maximum number of processes. One starts only when there is an item for it.
            with_children: whether the task may start processes, which must end when the worker
                does.

        Raises an exception raised by `task` when its item's turn comes, and RunError if a worker is
        killed. The worker processes end when the iteration ends for any reason, or when the main
        process is killed.
    """
    if workers < 1:
        raise ValueError(f"workers: {workers}")
    pool = _Pool(task, workers, with_children)
    numbered = enumerate(items)
    results: dict[int, tuple[bool, Any]] = {}
    sent = returned = 0
    try:
        while True:
            while sent - returned < workers * _IN_FLIGHT_PER_WORKER and pool.has_room():
                entry = next(numbered, None)
                if entry is None:
                    break
                pool.send(entry)
                sent += 1
            if returned == sent:
                return
            for number, succeeded, value in pool.receive():
                results[number] = (succeeded, value)
            while returned in results:
                succeeded, value = results.pop(returned)
                if not succeeded:
                    raise value
                returned += 1
                yield value
    finally:
        pool.stop()


class _Worker:
    """A worker process and the pipe to it.

    A thread in the process reads items from the pipe as they arrive, so that the next item is
    already there when one is finished, and so that neither side blocks forever on a full pipe.
    """

    def __init__(self, task: Callable[[Any], Any], with_children: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, worker_end = context.Pipe()
        self.process = context.Process(
            target=_work, args=(worker_end, task), daemon=not with_children
        )
        self.items = 0
        with _interrupt_deferred():
            self.process.start()
        # Close this copy, so that reading from the pipe ends when the process does.
        worker_end.close()

    def died(self) -> RunError:
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return RunError(f"a worker process ended by itself (exit code {code})")
        name = signal.Signals(-code).name
        hint = "; memory may have run out" if name == "SIGKILL" else ""
        return RunError(f"a worker process was killed by {name}{hint}")


class _Pool:
    def __init__(self, task: Callable[[Any], Any], most_workers: int, with_children: bool) -> None:
        self._task, self._with_children = task, with_children
        self._most_workers = most_workers
        self._workers: list[_Worker] = []

    def has_room(self) -> bool:
        if len(self._workers) < self._most_workers:
            return True
        return any(worker.items < _ITEMS_PER_WORKER for worker in self._workers)

    def send(self, entry: tuple[int, Any]) -> None:
        worker = min(self._workers, key=lambda worker: worker.items, default=None)
        if worker is None or (worker.items and len(self._workers) < self._most_workers):
            worker = _Worker(self._task, self._with_children)
            self._workers.append(worker)
        worker.items += 1
        try:
            worker.pipe.send(entry)
        except OSError:
            raise worker.died() from None

    def receive(self) -> list[tuple[int, bool, Any]]:
        """Wait for at least one worker; return the number, success and value of each result."""
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
    # A terminal or a job sends these signals to every process; the main process stops the others.
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL_SIGNALS)
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    items: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_take_items, args=(pipe, items), daemon=True).start()
    # The pipe ends when the main process has ended.
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
    """Defer signals while a process starts: in a half-started one, they print a traceback.

    They are blocked in the new process, which inherits the mask, and recorded in this one, where
    another thread may still receive them.
    """
    # The tracker unblocks Ctrl-C and SIGTERM when it starts, so it must run before.
    resource_tracker.ensure_running()
    noted: list[signal.Signals] = []
    with (
        handlers(unignored_signals(), lambda number, _: noted.append(signal.Signals(number))),
        signals_blocked(),
    ):
        yield
    if noted:
        signal.raise_signal(noted[0])
