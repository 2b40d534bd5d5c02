"""Document boundaries in text files, used both to cut files and to read chunks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

from megaphase.data_tools.text.file_types import Kind
from megaphase.data_tools.text.reading import Reading

# A longer line does not count as a blank line, since no chunk has room for it.
LONGEST_LINE_BYTES = 1 << 24

_PIECE_BYTES = 1 << 18
_BLANK_LINE = r"[ \t\r]*"


@dataclass(frozen=True)
class Boundaries:
    """Finds the document boundaries of a text file, at which it may be cut.

    Attributes:
        line: regular expression of a line that separates two documents, without its newline;
            None: every newline ends a document.
    """

    line: str | None

    @classmethod
    def of(cls, kind: Kind, reading: Reading) -> Boundaries:
        """Return the boundaries of a JSONL or plain text file."""
        if kind == "jsonl":
            return cls(None)
        return cls(_BLANK_LINE if reading.separator is None else separator_line(reading.separator))

    @property
    def remedy(self) -> str:
        """What to do about a document that is too large."""
        if self.line is None:
            return "split it"
        return "put a blank line or the --separator between documents, or use JSONL"

    @cached_property
    def between(self) -> str:
        """Regular expression of the separator of two documents, with the newline before it."""
        return r"\n" if self.line is None else rf"\n(?:{self.line}(?:\n|\Z))+"

    def end(self, data: bytes | bytearray, least: int) -> int:
        """Return the first document end at position `least` or later in `data`, or 0 if there is
        none.

        The start of `data` does not count as the start of a line.
        """
        if self.line is None:
            return data.find(b"\n", max(least - 1, 0)) + 1
        # The newline before the line that ends at `least` or later.
        begin = max(data.rfind(b"\n", 0, max(least - 1, 0)), 0)
        found = self._cut.search(data, begin)
        return found.end() if found else 0

    def end_in_file(self, file: BinaryIO, offset: int) -> int:
        """Like `end`, in a file; position 0 and the end of the file count as document ends."""
        if offset == 0:
            return 0
        begin = self._line_before(file, offset - 1)
        file.seek(begin)
        window = b""
        while piece := file.read(_PIECE_BYTES):
            window += piece
            if found := self.end(window, offset - begin):
                return begin + found
            begin, window = self._unfinished(begin, window)
        return begin + len(window)

    @cached_property
    def _cut(self) -> re.Pattern[bytes]:
        return re.compile(rf"\n{self.line}\n".encode())

    def _line_before(self, file: BinaryIO, offset: int) -> int:
        """Return the position of the last newline before `offset`, or `offset` if it is not
        needed."""
        least = max(offset - LONGEST_LINE_BYTES, 0)
        end = offset
        while self.line is not None and end > least:
            begin = max(end - _PIECE_BYTES, least)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                return begin + found
            end = begin
        return offset

    def _unfinished(self, begin: int, window: bytes) -> tuple[int, bytes]:
        """Return the part of a window without a document end in which one may have begun."""
        newline = window.rfind(b"\n")
        if self.line is None or newline < 0 or len(window) - newline > LONGEST_LINE_BYTES:
            newline = len(window)
        return begin + newline, window[newline:]


def separator_line(separator: str) -> str:
    """Return the regular expression of a line that consists of the separator."""
    return rf"{re.escape(separator)}\r?"
