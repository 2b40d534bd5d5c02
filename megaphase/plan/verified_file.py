"""Files that were written in pieces with hashes, of which every piece is verified when it is first
read.

What this process has not read is verified by `VerifiedFile.check_rest`, which a thread calls in the
background, see background_check.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.utils.errors import InputError, file_fault
from megaphase.utils.files import new_hash

# Written into a folder in which a piece was found altered, with the name of the file: the next
# process that opens the folder builds it again.
ALTERED_FILE = "altered"


class VerifiedFile:
    """A memory-mapped file.

    Attributes:
        bytes: uint8 [size], read-only; its users call `check` or `check_at` before they read.
        is_valid: whether all of it has been verified.
    """

    def __init__(self, path: Path, described: dict[str, Any], *, verified: bool) -> None:
        """
        Args:
            described: its size in `bytes`, and `pieces` as HashedChunkWriter.finish returns them.
            verified: whether all of it has just been verified.
        """
        self.path = path
        self.bytes = _map(path) if described["bytes"] else np.empty(0, np.uint8)
        pieces = described["pieces"]
        self._begins = np.array([begin for begin, _, _ in pieces], np.int64)
        self._ends = self._begins + np.array([size for _, size, _ in pieces], np.int64)
        self._hashes = [digest for _, _, digest in pieces]
        self._valid = np.full(len(pieces), verified)
        self.is_valid = verified or not pieces

    def check(self, begin: int, end: int) -> None:
        """Verify the bytes [begin, end), which are about to be read.

        Raises:
            InputError: they were altered.
        """
        if not self.is_valid:
            first = np.searchsorted(self._ends, begin, side="right")
            last = np.searchsorted(self._begins, end, side="left")
            self._check_pieces(first + np.flatnonzero(~self._valid[first:last]))

    def check_at(self, positions: np.ndarray) -> None:
        """Likewise verify the pieces that contain the bytes at these positions, int64 [n]."""
        if not self.is_valid:
            pieces = np.searchsorted(self._ends, positions, side="right")
            pieces = np.minimum(pieces, len(self._ends) - 1)
            self._check_pieces(np.unique(pieces[~self._valid[pieces]]))

    def _check_pieces(self, pieces: np.ndarray) -> None:
        for piece in pieces.tolist():
            begin, end = int(self._begins[piece]), int(self._ends[piece])
            self._compare(piece, self.bytes[begin:end])
        self.is_valid = bool(self._valid.all()) if len(pieces) else self.is_valid

    def check_rest(self, pause: Callable[[float], bool]) -> None:
        """Verify all pieces that this process has not read yet, in order, without mapping them.

        pause: called after each piece with the seconds that it took; a true value ends this.

        Raises:
            InputError: one was altered or cannot be read.
        """
        if self.is_valid:
            return
        try:
            with open(self.path, "rb", buffering=0) as file:
                for piece in np.flatnonzero(~self._valid).tolist():
                    began = time.monotonic()
                    begin, end = int(self._begins[piece]), int(self._ends[piece])
                    if not self._valid[piece]:
                        self._compare(piece, os.pread(file.fileno(), end - begin, begin))
                    if pause(time.monotonic() - began):
                        return
        except OSError as error:
            raise file_fault(self.path, error, "repair the disk, or start again") from None
        self.is_valid = True

    def _compare(self, piece: int, content: Any) -> None:
        digest = new_hash()
        digest.update(content)
        if digest.hexdigest() != self._hashes[piece]:
            raise self._altered(piece)
        self._valid[piece] = True

    def _altered(self, piece: int) -> InputError:
        with suppress(OSError):
            (self.path.parent / ALTERED_FILE).write_text(self.path.name)
        begin, end = int(self._begins[piece]), int(self._ends[piece])
        return InputError(
            self.path,
            f"was altered: the bytes {begin:,} to {end - 1:,} are not those that were written",
            "start again, and it will be built again",
        )


def _map(path: Path) -> np.ndarray:
    # A plain view: numpy's memmap class costs microseconds at every use. Of a path that is no text
    # it looks up every folder.
    return np.asarray(np.memmap(str(path), dtype=np.uint8, mode="r"))


class VerifiedArray:
    """An array in a VerifiedFile, or in memory, of which rows are verified before they are read."""

    def __init__(self, array: np.ndarray, file: VerifiedFile | None = None, first: int = 0) -> None:
        """
        Args:
            array: [rows, ...], contiguous.
            file: whose bytes it is a view of; None: it is in memory.
            first: the byte at which it begins there.
        """
        self._array, self._file, self._first = array, file, first
        self._row_bytes = array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))

    @classmethod
    def of(
        cls,
        file: VerifiedFile,
        dtype: type[np.generic],
        columns: int | None = None,
        first: int = 0,
        rows: int | None = None,
    ) -> VerifiedArray:
        """Return the array [rows] or [rows, columns] from a byte of a file on, by default all."""
        row_bytes = np.dtype(dtype).itemsize * (columns or 1)
        end = len(file.bytes) if rows is None else first + rows * row_bytes
        array = file.bytes[first:end].view(dtype)
        return cls(array if columns is None else array.reshape(-1, columns), file, first)

    def __len__(self) -> int:
        return len(self._array)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Return the rows [first, last)."""
        if self._file is not None:
            begin = self._first
            self._file.check(begin + first * self._row_bytes, begin + last * self._row_bytes)
        return self._array[first:last]

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows with these numbers, int64 [n]."""
        found: np.ndarray = self.holding(rows)[rows]
        return found

    def holding(self, rows: np.ndarray) -> np.ndarray:
        """Return the whole array, of which the caller reads these rows, int64 [n]."""
        if self._file is not None and not self._file.is_valid:
            self._file.check_at(self._first + rows * self._row_bytes)
        return self._array

    def whole(self) -> np.ndarray:
        """Return the whole array."""
        return self.rows(0, len(self))

    def part(self, first: int, last: int) -> VerifiedArray:
        """Return the array of the rows [first, last), which are not verified yet."""
        begin = self._first + first * self._row_bytes
        return VerifiedArray(self._array[first:last], self._file, begin)


def part(array: np.ndarray | VerifiedArray, first: int, last: int) -> np.ndarray | VerifiedArray:
    """Return the array of the rows [first, last)."""
    return array[first:last] if isinstance(array, np.ndarray) else array.part(first, last)


def holding(array: np.ndarray | VerifiedArray, rows: np.ndarray) -> np.ndarray:
    """Return an array of which the caller reads these rows, int64 [n]."""
    return array if isinstance(array, np.ndarray) else array.holding(rows)
