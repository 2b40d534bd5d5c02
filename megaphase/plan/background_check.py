"""Verify, while a run trains, what it has not read of its plan yet."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
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
        self._files = [file for file in files if not file.is_valid]
        self._found: InputError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._check, name="plan-check", daemon=True)

    def __enter__(self) -> Self:
        if self._files:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._files:
            self._thread.join()

    def raise_fault(self) -> None:
        """Raise InputError if a file was found altered, whether that part has been read or not."""
        if self._found is not None:
            raise self._found

    def _check(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        try:
            for file in self._files:
                file.check_rest(self._stop.wait)
        except InputError as fault:
            self._found = fault
