"""Cut a file, or a part of it, into chunks of whole documents."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megaphase.data_tools.text.boundaries import Boundaries
from megaphase.data_tools.text.chunk import TextChunk, TextPosition, advance, count_lines
from megaphase.data_tools.text.compression import decompressed, decompressed_ahead, named_errors
from megaphase.data_tools.text.file_types import (
    STDIN,
    check_text_file,
    display_name,
    file_type_of,
    is_compressed,
    size_on_disk,
)
from megaphase.data_tools.text.input_files import InputPath, open_input
from megaphase.data_tools.text.reading import Reading
from megaphase.utils.errors import InputError

CHUNK_BYTES = 1 << 20
# What is read in search of the end of a document before a file is taken to have none.
MOST_BYTES_WITHOUT_END = 1 << 27

_PIECE_BYTES = 1 << 18


def read_chunks(
    path: InputPath,
    reading: Reading,
    *,
    start: TextPosition = TextPosition(),  # noqa: B008
    begin: int = 0,
    end: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[TextChunk]:
    """Cut a file into chunks of about `chunk_bytes` that consist of whole documents.

    Args:
        path: a text file, a remote one too, or `-` for standard input.
        reading: defines where documents end.
        start: resume here, at the end of an earlier chunk. Plain and Parquet files are read from
            this position; compressed files are decompressed, and remote Arrow files read, from the
            beginning.
        begin, end: read only this part of the file, in bytes on disk. Consecutive parts
            [begin, end) give every document once and in order, wherever the file is cut. Of plain
            and Parquet files and local Arrow files nothing else is read; a compressed or remote
            Arrow file is read from its beginning to the end of the part.
        chunk_bytes: of text; must be the same for all parts of a file.

    Raises InputError if the file cannot be read, is compressed and damaged or truncated, or no
    document ends within 128 MB.
    """
    check_text_file(path)
    check_reading(path, reading, whole=begin == 0 and end is None)
    with named_errors(path):
        size = size_on_disk(path)
        last = end if end is not None and end < size else None
        if 0 < size <= begin or (last is not None and last <= begin):
            return
        kind = file_type_of(path, reading.stdin_kind)
        if kind == "parquet":
            yield from _parquet_chunks(path, reading, start, begin, last, chunk_bytes)
        elif kind == "arrow":
            from megaphase.data_tools.text.arrow import arrow_chunks

            yield from arrow_chunks(path, reading.keys, start, begin, last, chunk_bytes)
        elif path == STDIN:
            yield from _stdin_chunks(reading, start, chunk_bytes)
        elif is_compressed(path):
            yield from _compressed_chunks(path, reading, start, begin, last, chunk_bytes)
        else:
            yield from _plain_chunks(path, reading, start, begin, last, chunk_bytes)


def check_reading(path: InputPath, reading: Reading, *, whole: bool = True) -> None:
    """Raise InputError if a file cannot hold such documents, or cannot be read in parts as it
    would be."""
    if path == STDIN and not whole:
        problem = "cannot be read in parts"
        raise InputError(display_name(path), problem, "write it to a file first")
    is_structured = reading.pair is not None or reading.messages is not None
    if is_structured and file_type_of(path, reading.stdin_kind) == "txt":
        held = "translation pairs" if reading.messages is None else "conversations"
        problem = f"plain text holds no {held}"
        raise InputError(display_name(path), problem, "use JSONL, Parquet or Arrow")


def check_options(files: Iterable[InputPath], reading: Reading) -> None:
    """Raise InputError if an option says what is a document in none of the files."""
    kinds = {file_type_of(path, reading.stdin_kind) for path in files}
    if reading.separator is not None and kinds and "txt" not in kinds:
        problem = "ends documents of .txt files, and no file is one"
        raise InputError("--separator", problem, "leave it out")
    if reading.chooses_keys and kinds == {"txt"}:
        raise InputError(reading.key_option, "plain text has no keys", "leave it out")


def _parquet_chunks(
    path: InputPath,
    reading: Reading,
    start: TextPosition,
    begin: int,
    end: int | None,
    chunk_bytes: int,
) -> Iterator[TextChunk]:
    from megaphase.data_tools.text.parquet import parquet_chunks

    if isinstance(path, Path):
        yield from parquet_chunks(path, path, reading.keys, start, begin, end, chunk_bytes)
        return
    with open_input(path) as content:
        yield from parquet_chunks(path, content, reading.keys, start, begin, end, chunk_bytes)


def _plain_chunks(
    path: InputPath,
    reading: Reading,
    start: TextPosition,
    begin: int,
    end: int | None,
    chunk_bytes: int,
) -> Iterator[TextChunk]:
    ends = Boundaries.of(file_type_of(path, reading.stdin_kind), reading)
    with open_input(path) as file:
        first = ends.end_in_file(file, begin)
        last = file.seek(0, os.SEEK_END) if end is None else ends.end_in_file(file, end)
        position = start if start.offset >= first else TextPosition(first, line=0)
        pieces = _pieces_between(file, position.offset, last)
        yield from _uncompressed_chunks(path, pieces, ends, position, chunk_bytes)


def _stdin_chunks(reading: Reading, start: TextPosition, chunk_bytes: int) -> Iterator[TextChunk]:
    pieces = iter(partial(sys.stdin.buffer.read, _PIECE_BYTES), b"")
    ends = Boundaries.of(reading.stdin_kind, reading)
    for chunk in _uncompressed_chunks(STDIN, pieces, ends, TextPosition(), chunk_bytes):
        if chunk.end.offset > start.offset:
            yield chunk


def _uncompressed_chunks(
    path: InputPath,
    pieces: Iterable[bytes],
    ends: Boundaries,
    position: TextPosition,
    chunk_bytes: int,
) -> Iterator[TextChunk]:
    begin, lines_since = position.offset, 0
    for data, lines in _whole_documents(path, pieces, ends, position, chunk_bytes):
        after = advance(position, len(data), lines)
        yield TextChunk(path, position, after, data, position.offset, len(data), begin, lines_since)
        position, lines_since = after, lines_since + lines


def _compressed_chunks(
    path: InputPath,
    reading: Reading,
    start: TextPosition,
    begin: int,
    end: int | None,
    chunk_bytes: int,
) -> Iterator[TextChunk]:
    ends = Boundaries.of(file_type_of(path, reading.stdin_kind), reading)
    position, disk, read = TextPosition(), 0, 0
    # All parts of a file must agree on the positions, also those of other machines.
    decompress = decompressed_ahead if begin == 0 and end is None else decompressed
    with open_input(path) as file, closing(decompress(file, path.suffix)) as decompressing:

        def pieces() -> Iterator[bytes]:
            nonlocal read
            for piece, place in decompressing:
                read = place
                yield piece

        for data, lines in _whole_documents(path, pieces(), ends, position, chunk_bytes):
            after = advance(position, len(data), lines)
            if begin <= disk and start.offset < after.offset:
                yield TextChunk(path, position, after, data, disk, read - disk)
            position, disk = after, read
            if end is not None and disk >= end:
                return


class NoDocumentEnd(InputError):
    """A document has no end within 128 MB; --on-error skip does not help."""


def _whole_documents(
    path: InputPath,
    pieces: Iterable[bytes],
    ends: Boundaries,
    position: TextPosition,
    chunk_bytes: int,
) -> Iterator[tuple[bytes, int]]:
    """Join the pieces and cut them at document ends; yield each chunk with its number of lines.
    `position` is where the pieces begin."""
    buffer, searched = bytearray(), chunk_bytes
    for piece in pieces:
        buffer += piece
        while cut := ends.end(buffer, searched):
            with memoryview(buffer) as view:
                data = bytes(view[:cut])
            del buffer[:cut]
            lines = _count_lines(data)
            yield data, lines
            position, searched = advance(position, cut, lines), chunk_bytes
        searched = max(searched, len(buffer))
        if len(buffer) > chunk_bytes + MOST_BYTES_WITHOUT_END:
            line = position.line or count_lines(path, position.offset) + 1
            problem = f"no document ends within {MOST_BYTES_WITHOUT_END >> 20} MB of here"
            raise NoDocumentEnd(f"{display_name(path)}:{line}", problem, ends.remedy)
    if buffer:
        data = bytes(buffer)
        yield data, _count_lines(data)


def _count_lines(data: bytes) -> int:
    """Return the number of newlines, three times as fast as `bytes.count`."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))


def _pieces_between(file: BinaryIO, offset: int, end: int) -> Iterator[bytes]:
    file.seek(offset)
    while offset < end and (piece := file.read(min(_PIECE_BYTES, end - offset))):
        offset += len(piece)
        yield piece
