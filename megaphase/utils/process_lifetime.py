"""Make a process end when its parent ends, for any reason."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from megaphase.utils.errors import EXIT_FAILED

_VARIABLE = "MEGAPHASE_PARENT"
_PR_SET_PDEATHSIG = 1


def ends_with_this_process(pid: int | None = None) -> dict[str, str]:
    """Return environment variables for a `megaphase` command that must not outlive this process,
    or that with this pid, which is its parent."""
    return {_VARIABLE: str(os.getpid() if pid is None else pid)}


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends, if the parent requested it
    (Linux)."""
    # Not inherited by processes that this one starts.
    parent = os.environ.pop(_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    # The kernel does this immediately, even if the parent was killed by SIGKILL.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # the parent has already ended
        sys.exit(EXIT_FAILED)
