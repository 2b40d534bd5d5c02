"""The stacks of all threads of this process, while they keep running."""

from __future__ import annotations

from typing import NamedTuple

from megaphase.fault_tolerance._thread_stacks import thread_stacks


class Frame(NamedTuple):
    """A call on a stack."""

    filename: str
    line: int
    function: str


def all_stacks() -> dict[int, list[Frame]]:
    """Return the stacks of all threads that run Python by thread id, innermost call first.

    They are taken at once, in C++. Two other ways have crashed runs (CPython 3.11): walking the
    frames returned by sys._current_frames in Python, where f_back has returned a freed object; and
    faulthandler.dump_traceback, which reads the list of threads without its lock, and so also
    threads of C++ that are just entering Python, such as gloo's.
    """
    return {ident: [Frame(*frame) for frame in stack] for ident, stack in thread_stacks().items()}
