"""Verify, while a run trains, what it has not read of its plan yet."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

from megaphase.plan.verified_file import VerifiedFile
from megaphase.utils.errors import InputError

_LOWEST_PRIORITY = 19


class BackgroundCheck:
    """Context manager of a thread that verifies files.

    It has the lowest priority, and pauses after each piece for as long as that took: reading the
    batches comes first.
    """

    def __init__(self, files: Sequence[VerifiedFile]) -> None:
        self._first, self._known = files, list[VerifiedFile]()
        self._found: InputError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.add(self._first)
        return self

    def add(self, files: Sequence[VerifiedFile]) -> None:
        """Also verify those of these files that it does not know yet, after the others."""
        new = [file for file in files if not file.is_valid and file not in self._known]
        if new:
            self._known += new
            check = partial(self._check, new, self._thread)
            self._thread = threading.Thread(target=check, name="plan-check", daemon=True)
            self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def raise_fault(self) -> None:
        """Raise InputError if a file was found altered, whether that part has been read or not."""
        if self._found is not None:
            raise self._found

    def _check(self, files: Sequence[VerifiedFile], before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        try:
            for file in files:
                file.check_rest(self._stop.wait)
        except InputError as fault:
            self._found = fault
