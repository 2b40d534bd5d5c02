"""Dump the stacks of all threads of this process while they keep running."""

from __future__ import annotations

import faulthandler
import os
import re
import tempfile
from typing import IO, NamedTuple

_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'  File "(.*)", line (\d+|\?+) in (.*)')


class Frame(NamedTuple):
    """A call on a stack; line 0 if it is not known."""

    filename: str
    line: int
    function: str


def all_stacks() -> dict[int, list[Frame]]:
    """Return the stacks of all threads that run Python by thread id, innermost call first.

    faulthandler writes them at once, without frame objects. Walking the frames returned by
    sys._current_frames while their threads run corrupts memory (CPython 3.11): f_back has returned
    a freed object, which crashed a run.
    """
    with _scratch_file() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read().decode("ascii", "replace")
    stacks: dict[int, list[Frame]] = {}
    current: list[Frame] = []
    for line in text.splitlines():
        if thread := _THREAD.match(line):
            current = stacks.setdefault(int(thread[1], 16), [])
        elif frame := _FRAME.match(line):
            number = int(frame[2]) if frame[2].isdecimal() else 0
            current.append(Frame(_unescaped(frame[1]), number, _unescaped(frame[3])))
    return stacks


def _scratch_file() -> IO[bytes]:
    """Open a file in memory if the system can: a pipe could fill up."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("stacks"), "w+b")
    return tempfile.TemporaryFile()


def _unescaped(name: str) -> str:
    """Decode faulthandler's escapes of non-ASCII characters, \\xe9 or \\u4e2d."""
    return name.encode().decode("unicode_escape") if "\\" in name else name
