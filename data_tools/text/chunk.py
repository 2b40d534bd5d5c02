"""A piece of a file that holds whole documents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class TextPosition:
    """Where in a file a document begins.

    Attributes:
        offset: decompressed bytes before it; of Parquet, rows.
        line: its number, from 1; of Parquet, the row's. 0: not known.
    """

    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class TextChunk:
    """Some whole documents of a file, not decoded yet.

    Attributes:
        path: the file.
        start, end: where the chunk begins and ends; reading can go on at `end`.
        data: the lines, decompressed; of Parquet, the rows as an Arrow IPC stream.
        file_begin: bytes of the file, as it lies on the disk, before the chunk; the same however
            reading was begun. Of Parquet, interpolated by row within a row group.
        file_bytes: how much of the file, as it lies on the disk, was read for this chunk.
        counted_from, lines_since: where reading began, and the lines since then; needed where the
            line of the start is not known.
    """

    path: Path
    start: TextPosition
    end: TextPosition
    data: bytes
    file_begin: int
    file_bytes: int
    counted_from: int = 0
    lines_since: int = 0

    @property
    def first_line(self) -> int:
        """Number of the chunk's first line; where it is not known, the file is read up to where
        reading began, once in a process."""
        if self.start.line:
            return self.start.line
        return count_lines(self.path, self.counted_from) + self.lines_since + 1


@lru_cache(maxsize=1)
def count_lines(path: Path, size: int) -> int:
    """How many lines end within the first `size` bytes of a file."""
    lines = 0
    with open(path, "rb") as file:
        while size and (piece := file.read(min(size, _PIECE_BYTES))):
            lines += piece.count(b"\n")
            size -= len(piece)
    return lines


def advance(position: TextPosition, size: int, lines: int) -> TextPosition:
    """The position after `size` bytes from `position` on, in which so many lines end."""
    return TextPosition(position.offset + size, position.line and position.line + lines)
