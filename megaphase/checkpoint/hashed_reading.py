"""The hash of a file, computed from its bytes when they are read for another purpose.

A hash needs the bytes in the order of the file. So the tensors that will be read are announced, and
each waits until those before it have been read. Bytes in between that nobody wants are read for the
hash alone.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from megaphase.checkpoint.hashed_file import Bytes
from megaphase.checkpoint.sequential_reader import SequentialReader
from megaphase.utils.errors import InputError
from megaphase.utils.files import new_hash


@dataclass(frozen=True)
class Place:
    """A tensor's bytes [begin, end) in a file; `turn`: the number of the parameter's kind in the
    order in which they are read."""

    name: str
    begin: int
    end: int
    turn: int = 0


def in_file_order(places: Sequence[Place]) -> list[Place]:
    """Return those of tensors, given in the order in which they are read, that follow each other in
    the file: of all such choices, one with the most bytes."""
    # For each choice that may still become the best one: the end of its last tensor, its bytes.
    ends: list[tuple[int, int]] = [(0, 0)]
    last: dict[tuple[int, int], tuple[Place, tuple[int, int]]] = {}
    for place in places:
        before = ends[bisect_left(ends, (place.begin + 1, -1)) - 1]
        choice = place.end, before[1] + place.end - place.begin
        at = bisect_left(ends, choice)
        if choice in last or ends[at - 1][1] >= choice[1]:
            continue
        insort(ends, choice)
        last[choice] = place, before
        while at + 1 < len(ends) and ends[at + 1][1] <= choice[1]:
            del ends[at + 1]
    found, choice = [], ends[-1]
    while choice in last:
        place, choice = last[choice]
        found.append(place)
    return found[::-1]


def most_at_once(files: Iterable[Sequence[Place]]) -> int:
    """Return how many of several files are between their first and their last turn at one time."""
    changes = []
    for places in files:
        if places:
            changes += [(places[0].turn, 1), (places[-1].turn + 1, -1)]
    return max(accumulate((change for _, change in sorted(changes)), initial=0))


class HashedReading:
    """The hash of one file; the tensors of `planned` are read in this order, by any threads."""

    def __init__(
        self,
        reader: SequentialReader,
        path: Path,
        planned: Sequence[Place],
        advance: Callable[[int], object],
        when_read: Callable[[], object],
    ) -> None:
        """
        Args:
            reader: reads the file, from its beginning.
            planned: they follow each other in the file.
            advance: called with numbers of bytes that have been hashed.
            when_read: called once all of `planned` have been read.
        """
        self._reader, self._path = reader, path
        self._advance, self._when_read = advance, when_read
        self._turns = {place.name: number for number, place in enumerate(planned)}
        self._turn, self._changed = 0, threading.Condition()
        self._given_up = False
        self._digest, self._hashed = new_hash(), 0
        self._piece = np.empty(0, np.uint8)  # the bytes that have been read and not hashed yet

    def wait_for(self, name: str, offset: int) -> bool:
        """Wait for a tensor's turn; return whether `read_into` reads its bytes from `offset` on.

        Raises:
            CancelledError: the tensors before it will not be read.
        """
        turn = self._turns.get(name)
        if turn is None:
            return False
        with self._changed:
            self._changed.wait_for(lambda: self._given_up or self._turn >= turn)
            if self._given_up:
                raise CancelledError
            if self._turn > turn or offset < self._hashed:
                return False
        self._pass(offset - self._hashed)
        return True

    def read_into(self, out: Bytes) -> None:
        """Read and hash the next bytes [n] of the file.

        Raises:
            InputError: it has fewer.
        """
        while len(out):
            part = self._next(len(out))
            np.copyto(out[: len(part)], part)  # lets other threads work
            out = out[len(part) :]

    def done(self, name: str) -> None:
        """A tensor has been read, so that it is the next one's turn."""
        with self._changed:
            if self._turns.get(name) != self._turn:
                return
            self._turn += 1
            self._changed.notify_all()
        if self._turn == len(self._turns):
            self._when_read()

    def give_up(self) -> None:
        """A tensor will not be read: those that wait for it raise CancelledError."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def finish(self, size: int) -> str:
        """Read the rest of the file, of `size` bytes, and return the hash; call it once no tensor
        is read any more."""
        try:
            self._pass(size - self._hashed)
        finally:
            self.close()
        return str(self._digest.hexdigest())

    def close(self) -> None:
        """Close the file."""
        self._piece = np.empty(0, np.uint8)
        self._reader.close()

    def _pass(self, count: int) -> None:
        while count:
            count -= len(self._next(count))

    def _next(self, most: int) -> Bytes:
        """Hash and return the next bytes, at least one."""
        if not len(self._piece):
            self._piece = self._reader.next_piece()
            if not len(self._piece):
                raise InputError(self._path, "is truncated", "use another checkpoint")
        part, self._piece = self._piece[:most], self._piece[most:]
        self._digest.update(part)
        self._hashed += len(part)
        self._advance(len(part))
        return part
