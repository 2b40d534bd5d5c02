"""Calls to object stores and web servers: each has a deadline, and is repeated where that may help.

fsspec and the libraries behind it are an extra; they are imported when a URL is used.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from megaphase.utils.errors import InputError, RunError

Result = TypeVar("Result")

# Errors that no repetition helps against: the user's name, rights or configuration is wrong.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError,
            NotImplementedError, ImportError, ValueError, TypeError)  # fmt: skip
_LASTING_NAMES = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "NoRegionError",
    "InvalidRegionError",
    "RepositoryNotFoundError",
    "GatedRepoError",
    "DefaultCredentialsError",
}
NO_SUCH_FILE = "no such file, folder or bucket"
_PACKAGES = {"s3": "megaphase[fsspec]", "hf": "megaphase[fsspec]", "gs": "gcsfs", "gcs": "gcsfs"}


@dataclass
class Retries:
    """How often and how long a call is tried.

    Attributes:
        attempts: including the first.
        pause_seconds: before the second attempt; each later pause is twice as long.
        longest_pause_seconds: the limit of that.
        of_requests: how often the library for `s3://` repeats a single request of a call, such as a
            part of a large upload.
        stalled_seconds: an attempt in which no byte moves for so long has failed.
        notice_seconds: after so long without a byte, `first_failure_said` says so.
    """

    attempts: int = 6
    pause_seconds: float = 1.0
    longest_pause_seconds: float = 30.0
    of_requests: int = 3
    stalled_seconds: float = 120.0
    notice_seconds: float = 10.0


RETRIES = Retries()


class RemoteError(RunError):
    """A store or a server failed or could not be reached, also when it was tried again."""


class Stalled(Exception):
    """A call has moved no byte for `Retries.stalled_seconds`."""


class Progress:
    """Records when a call last moved bytes; fsspec's transfers call it."""

    def __init__(self, advance: Callable[[int], object] = lambda count: None) -> None:
        self.last, self._advance = time.monotonic(), advance

    def moved(self, count: int) -> None:
        """Note that `count` more bytes were moved."""
        self.last = time.monotonic()
        self._advance(count)


class Pending(Generic[Result]):
    """A call in a daemon thread: one that never returns does not keep the process from ending."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call = call
        self._done = threading.Event()
        self._value: Result | None = None
        self._error: BaseException | None = None
        run = copy_context().run
        threading.Thread(target=run, args=(self._run,), name="remote call", daemon=True).start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def is_done(self, seconds: float) -> bool:
        """Wait at most so long; return whether the call has ended."""
        return self._done.wait(seconds)

    def result(self) -> Result:
        """Wait for the call, and return its value or raise its error."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


_say_failure: ContextVar[Callable[[str], object] | None] = ContextVar("say", default=None)


@contextmanager
def first_failure_said(say: Callable[[str], object]) -> Iterator[None]:
    """Say the first failure, or long silence, of a call within the block; later ones are silent."""
    said = threading.Lock()

    def say_once(text: str) -> None:
        if said.acquire(blocking=False):
            say(text)

    token = _say_failure.set(say_once)
    try:
        yield
    finally:
        _say_failure.reset(token)


def with_retries(
    url: str,
    failed: str,
    call: Callable[[Progress], Result],
    *,
    advance: Callable[[int], object] = lambda count: None,
) -> Result:
    """Return the result of a call, which is repeated while it fails for a reason that may pass.

    Args:
        failed: what could not be done, for messages, as in "cannot be read".
        call: gets a Progress, to which it reports bytes that it moves.

    Raises:
        InputError: it failed for a reason that does not pass, such as a missing file.
        RemoteError: it failed in all attempts.
    """
    pause = RETRIES.pause_seconds
    for attempt in range(1, RETRIES.attempts + 1):
        try:
            return _within_deadline(url, call, Progress(advance))
        except (InputError, RunError):
            raise
        except Exception as error:
            if _is_lasting(error):
                raise _input_error(url, failed, error) from None
            reason = _reason(error)
        if attempt < RETRIES.attempts:
            _say(f"{url}: {failed} ({reason}); trying again, {RETRIES.attempts} times in all")
            time.sleep(pause)
            pause = min(2 * pause, RETRIES.longest_pause_seconds)
    raise RemoteError(
        f"{url}: {failed} ({reason}), tried {RETRIES.attempts} times; check the network and the "
        "store, and run the same command again"
    )


def _within_deadline(url: str, call: Callable[[Progress], Result], progress: Progress) -> Result:
    pending = Pending(lambda: call(progress))
    while not pending.is_done(min(1.0, RETRIES.stalled_seconds / 4)):
        silent_seconds = time.monotonic() - progress.last
        if silent_seconds > RETRIES.stalled_seconds:
            raise Stalled(f"nothing came for {RETRIES.stalled_seconds:g} s")
        if silent_seconds > RETRIES.notice_seconds:
            _say(f"{url}: no answer for {RETRIES.notice_seconds:g} s; still waiting")
    return pending.result()


def _say(text: str) -> None:
    say = _say_failure.get()
    if say is not None:
        say(text)


def _is_lasting(error: Exception) -> bool:
    status = getattr(error, "status", None)  # of an answer over HTTP
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, _LASTING) or type(error).__name__ in _LASTING_NAMES


def _input_error(url: str, failed: str, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(url, NO_SUCH_FILE, "check the URL")
    remedy = "check the URL and, for a private one, the credentials in this environment"
    return InputError(url, f"{failed} ({_reason(error)})", remedy)


def _reason(error: BaseException) -> str:
    """Return a library's error in one line; some of them have no text."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


_file_systems: dict[tuple[str, str, int], Any] = {}
_file_systems_lock = threading.Lock()


def protocol_of(url: str) -> str:
    """Return the part of a URL before `://`."""
    return url.partition("://")[0].lower()


def file_system(url: str) -> Any:
    """Return fsspec's file system for a URL, the same one for all threads of this process.

    Credentials, endpoints and other options are those of fsspec and of the library behind it: their
    environment variables and configuration files.

    Raises:
        InputError: a package is missing, or the protocol is unknown.
    """
    protocol = protocol_of(url)
    place = url.partition("://")[2].partition("/")[0]
    with _file_systems_lock:
        key = (protocol, place, os.getpid())
        if key not in _file_systems:
            _file_systems[key] = _new_file_system(url, protocol)
        return _file_systems[key]


def _new_file_system(url: str, protocol: str) -> Any:
    package = _PACKAGES.get(protocol, "megaphase[fsspec]")
    try:
        import fsspec

        # This module caches no listings: others may change what lies there. Its callers choose the
        # file system's instance, which fsspec would make anew for every thread.
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        configured = fsspec.config.conf.get(protocol, {})
        if protocol == "s3" and "config_kwargs" not in configured:
            repeated = {"max_attempts": RETRIES.of_requests}
            limits = {"connect_timeout": 20, "read_timeout": 60, "retries": repeated}
            options["config_kwargs"] = limits
        file_system, _ = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        problem = f"{protocol}:// needs a package that is not installed ({_reason(error)})"
        raise InputError(url, problem, f"pip install '{package}'") from None
    except ValueError as error:
        known = "s3://, gs://, hf://, https:// and others"
        raise InputError(
            url, f"cannot be used ({_reason(error)})", f"fsspec knows {known}"
        ) from None
    if protocol == "s3":
        file_system.retries = 1  # these calls are repeated by `with_retries`
    return file_system
