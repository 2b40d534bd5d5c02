"""Where a document of a text file ends: one definition for cutting files and for reading chunks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

from megaphase.data_tools.text.file_types import Kind
from megaphase.data_tools.text.reading import Reading

# A longer line is not taken for a blank one; no chunk has room for it.
LONGEST_LINE_BYTES = 1 << 24

_PIECE_BYTES = 1 << 18
_BLANK_LINE = r"[ \t\r]*"


@dataclass(frozen=True)
class Boundaries:
    """Where the documents of a text file end, and where it may be cut.

    Attributes:
        line: regular expression of a line that stands between two documents, without its newline;
            None: every newline ends a document.
    """

    line: str | None

    @classmethod
    def of(cls, kind: Kind, reading: Reading) -> Boundaries:
        """Those of a JSONL or plain text file."""
        if kind == "jsonl":
            return cls(None)
        return cls(_BLANK_LINE if reading.separator is None else separator_line(reading.separator))

    @cached_property
    def between(self) -> str:
        """Regular expression of what stands between two documents, the newline before included."""
        return r"\n" if self.line is None else rf"\n(?:{self.line}(?:\n|\Z))+"

    def end(self, data: bytes | bytearray, least: int) -> int:
        """The first place at `least` or later where a document ends; 0 where there is none.

        The beginning of `data` is not taken for the beginning of a line.
        """
        if self.line is None:
            return data.find(b"\n", max(least - 1, 0)) + 1
        # The newline before the line that ends at `least` or later.
        begin = max(data.rfind(b"\n", 0, max(least - 1, 0)), 0)
        found = self._cut.search(data, begin)
        return found.end() if found else 0

    def end_in_file(self, file: BinaryIO, offset: int) -> int:
        """The same in a file; 0 and the end of the file count as the end of a document."""
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
        """Where the last newline before `offset` is; `offset` itself where it does not matter."""
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
        """What of a window without an end may be the beginning of one."""
        newline = window.rfind(b"\n")
        if self.line is None or newline < 0 or len(window) - newline > LONGEST_LINE_BYTES:
            newline = len(window)
        return begin + newline, window[newline:]


def separator_line(separator: str) -> str:
    """Regular expression of a line that is exactly the separator."""
    return rf"{re.escape(separator)}\r?"
