"""What all threads of this process are doing, seen by one of them while the others go on."""

from __future__ import annotations

import faulthandler
import os
import re
import tempfile
from typing import IO, NamedTuple

_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'  File "(.*)", line (\d+|\?+) in (.*)')


class Frame(NamedTuple):
    """A call: line 0 where it is not known."""

    filename: str
    line: int
    function: str


def all_stacks() -> dict[int, list[Frame]]:
    """The stacks of all threads that run Python by their idents, innermost call first.

    faulthandler writes them down in one go, without frame objects. To walk the frames that
    sys._current_frames gives, while their threads run on, corrupts memory (CPython 3.11): f_back
    was seen to give a freed object, and a run died of it.
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
    """In memory, where the system can: not a pipe, which would be full one day."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("stacks"), "w+b")
    return tempfile.TemporaryFile()


def _unescaped(name: str) -> str:
    """faulthandler writes what is not ASCII as \\xe9 or \\u4e2d."""
    return name.encode().decode("unicode_escape") if "\\" in name else name
