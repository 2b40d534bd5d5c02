"""The command that runs a module in another process of this Python."""

from __future__ import annotations

import sys


def python_command(module: str, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
    """Return `python OPTIONS -m MODULE ARGUMENTS`.

    With -P, as modules of the working directory would otherwise come before the installed ones: an
    unbuilt checkout, or a user's file with the name of a library.
    """
    return [sys.executable, "-P", *options, "-m", module, *arguments]
