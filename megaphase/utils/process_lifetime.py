"""A process that ends when the one that started it does, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from megaphase.utils.errors import EXIT_FAILED

_VARIABLE = "MEGAPHASE_PARENT"
_PR_SET_PDEATHSIG = 1


def ends_with_this_process() -> dict[str, str]:
    """For the environment of a `megaphase` command that is not to outlive this process."""
    return {_VARIABLE: str(os.getpid())}


def end_with_parent() -> None:
    """Be killed when the parent ends, where it has asked for that; on Linux alone."""
    # Not for processes that this one starts in its turn.
    parent = os.environ.pop(_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    # The kernel does it at once, also where the parent was killed by SIGKILL.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before
        sys.exit(EXIT_FAILED)
