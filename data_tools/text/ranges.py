"""Ranges of bytes of a file, which a worker reads by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaphase.data_tools.text.chunk import TextChunk, TextPosition
from megaphase.data_tools.text.chunks import CHUNK_BYTES, read_chunks
from megaphase.data_tools.text.file_types import STDIN, has_rows, is_compressed, size_on_disk
from megaphase.data_tools.text.input_files import InputPath
from megaphase.data_tools.text.reading import Reading


@dataclass(frozen=True)
class TextRange:
    """Bytes [begin, end) of a plain text file on this machine; consecutive ranges have every
    document once and in order, see `read_chunks`."""

    path: Path
    begin: int
    end: int

    def chunk(self, reading: Reading) -> TextChunk:
        """Read the documents of the range, of which a chunk may have none."""
        found = list(
            read_chunks(
                self.path,
                reading,
                begin=self.begin,
                end=self.end,
                chunk_bytes=self.end - self.begin,
            )
        )
        if not found:
            place = TextPosition(self.begin, line=0)
            return TextChunk(self.path, place, place, b"", self.begin, 0)
        first, last = found[0], found[-1]
        return TextChunk(
            path=self.path,
            start=first.start,
            end=last.end,
            data=b"".join(each.data for each in found),
            file_begin=first.file_begin,
            file_bytes=sum(each.file_bytes for each in found),
            counted_from=first.counted_from,
        )


def can_be_ranged(path: InputPath) -> bool:
    """Return whether any bytes of a file can be read without those before them."""
    return (
        isinstance(path, Path) and path != STDIN and not has_rows(path) and not is_compressed(path)
    )


def ranges_of(
    path: Path, begin: int, end: int | None, range_bytes: int = CHUNK_BYTES
) -> Iterator[TextRange]:
    """Cut the bytes [begin, end) of a file, or from `begin` on, into ranges."""
    size = size_on_disk(path)
    stop = size if end is None else min(end, size)
    for first in range(begin, stop, range_bytes):
        yield TextRange(path, first, min(first + range_bytes, stop))
