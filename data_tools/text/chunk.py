"""Chunks: pieces of a file that consist of whole documents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megaphase.data_tools.text.input_files import InputPath, open_input

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class TextPosition:
    """The position of a document in a file.

    Attributes:
        offset: decompressed bytes before the document; in Parquet and Arrow, rows.
        line: its line number, from 1; in Parquet and Arrow, its row number; 0 if it is not known.
    """

    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class TextChunk:
    """Some whole documents of a file, not decoded yet.

    Attributes:
        path: the file.
        start, end: where the chunk begins and ends; reading can resume at `end`.
        data: the lines, decompressed; in Parquet and Arrow, the rows as an Arrow IPC stream.
        file_begin: bytes on disk before the chunk, wherever reading began. In Parquet
            and Arrow, interpolated by row within a row group or record batch.
        file_bytes: bytes on disk that were read for this chunk.
        counted_from, lines_since: the offset at which reading began and the number of lines since
            then; used if the line number of `start` is not known.
    """

    path: InputPath
    start: TextPosition
    end: TextPosition
    data: bytes
    file_begin: int
    file_bytes: int
    counted_from: int = 0
    lines_since: int = 0

    @property
    def first_line(self) -> int:
        """Number of the chunk's first line. If it is not known, the lines before the place where
        reading began are counted, once per process."""
        if self.start.line:
            return self.start.line
        return count_lines(self.path, self.counted_from) + self.lines_since + 1


@lru_cache(maxsize=1)
def count_lines(path: InputPath, size: int) -> int:
    """Return the number of lines that end within the first `size` bytes of a file."""
    lines = 0
    with open_input(path) as file:
        while size and (piece := file.read(min(size, _PIECE_BYTES))):
            lines += piece.count(b"\n")
            size -= len(piece)
    return lines


def advance(position: TextPosition, size: int, lines: int) -> TextPosition:
    """Return the position after `size` more bytes in which `lines` lines end."""
    return TextPosition(position.offset + size, position.line and position.line + lines)
