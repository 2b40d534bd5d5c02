"""Read Arrow files, one record batch at a time: IPC streams, as Hugging Face `datasets` writes
them, and IPC files, which are streams between two marks (Feather version 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from megaphase.data_tools.text.chunk import TextChunk, TextPosition
from megaphase.data_tools.text.input_files import InputPath, open_input
from megaphase.data_tools.text.nested_rows import as_bytes
from megaphase.data_tools.text.rows import (
    MOST_ROWS_OF_CHUNK,
    ROWS_AT_ONCE,
    columns_to_read,
    damage_named,
    serialized,
)
from megaphase.utils.errors import InputError

_MARK = b"ARROW1"  # at both ends of an IPC file; at the start followed by two more bytes
_FEATHER_1 = b"FEA1"
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def arrow_chunks(
    path: InputPath,
    keys: Sequence[str],
    start: TextPosition,
    begin: int,
    end: int | None,
    chunk_bytes: int,
) -> Iterator[TextChunk]:
    """Yield the chunks of an Arrow file, see `read_chunks`.

    A local file is mapped, so that what is passed over is not read. Also raises InputError if two
    columns have the same requested name.
    """
    with damage_named(path, "Arrow"), ExitStack() as resources:
        source = _open(path, resources)
        stream = _open_stream(path, source)
        columns = columns_to_read(path, stream.schema, keys)
        for piece in _pieces(stream, source, columns, chunk_bytes):
            if end is not None and piece.begin >= end:
                return
            if piece.begin >= begin and piece.end_row > start.offset:
                yield piece.chunk(path, stream.schema.names)
        _check_end(path, source)


def _open(path: InputPath, resources: ExitStack) -> pa.NativeFile:
    if isinstance(path, Path):
        return resources.enter_context(pa.memory_map(str(path)))
    return pa.PythonFile(resources.enter_context(open_input(path)), mode="r")


def _open_stream(path: InputPath, source: pa.NativeFile) -> pa.RecordBatchReader:
    """Return a reader of the stream, which in an IPC file begins after the mark."""
    first = source.read(8)
    if first[: len(_FEATHER_1)] == _FEATHER_1:
        problem = "is a Feather file of version 1"
        raise InputError(path, problem, "write it again with pyarrow.feather.write_feather")
    is_file = first[: len(_MARK)] == _MARK
    if is_file:
        source.seek(source.size() - len(_MARK))
        if source.read(len(_MARK)) != _MARK:
            raise pa.ArrowInvalid("the mark at its end is missing")
    source.seek(8 if is_file else 0)
    return pa.ipc.open_stream(source)


def _check_end(path: InputPath, source: pa.NativeFile) -> None:
    """Refuse a stream that was cut off between two batches, and one with another behind it."""
    end, size = source.tell(), source.size()
    source.seek(max(end - len(_END_OF_STREAM), 0))
    if source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise pa.ArrowInvalid("the mark of the stream's end is missing")
    source.seek(size - len(_MARK))
    if end != size and source.read(len(_MARK)) != _MARK:
        problem = f"has {size - end:,} bytes after the end of its stream"
        raise InputError(path, problem, "write each stream to a file of its own")


@dataclass(frozen=True)
class _Piece:
    """Rows of one or several batches; `begin` and `end` are the positions of their bytes."""

    batches: list[pa.RecordBatch]
    row: int
    begin: int
    end: int

    @property
    def end_row(self) -> int:
        rows: int = sum(batch.num_rows for batch in self.batches)
        return self.row + rows

    def chunk(self, path: InputPath, names: Sequence[str]) -> TextChunk:
        return TextChunk(
            path=path,
            start=TextPosition(self.row, self.row + 1),
            end=TextPosition(self.end_row, self.end_row + 1),
            data=serialized(self.batches, names),
            file_begin=self.begin,
            file_bytes=self.end - self.begin,
        )


def _pieces(
    stream: pa.RecordBatchReader, source: pa.NativeFile, columns: Sequence[str], chunk_bytes: int
) -> Iterator[_Piece]:
    """Yield the rows, about `chunk_bytes` at a time; where the pieces begin does not depend on
    which of them are used."""
    pending: list[pa.RecordBatch] = []
    row = rows = size = 0
    begin = batch_begin = source.tell()
    while (batch := _next_batch(stream)) is not None:
        batch, batch_end = batch.select(columns), source.tell()
        _check(batch)
        at_once = max(1, min(chunk_bytes * batch.num_rows // max(batch.nbytes, 1), ROWS_AT_ONCE))
        for first in range(0, batch.num_rows, at_once):
            part = batch.slice(first, at_once)
            pending.append(part)
            rows, size = rows + part.num_rows, size + part.nbytes
            if size >= chunk_bytes or rows >= MOST_ROWS_OF_CHUNK:
                done = (first + part.num_rows) / batch.num_rows
                place = batch_begin + int((batch_end - batch_begin) * done)
                yield _Piece(pending, row, begin, place)
                pending, row, begin, rows, size = [], row + rows, place, 0, 0
        batch_begin = batch_end
    if pending:
        yield _Piece(pending, row, begin, batch_begin)


def _next_batch(stream: pa.RecordBatchReader) -> pa.RecordBatch | None:
    try:
        return stream.read_next_batch()
    except StopIteration:
        return None


def _check(batch: pa.RecordBatch) -> None:
    """Refuse wrong offsets, which would be followed out of the file; whether text is UTF-8 is
    checked by row."""
    for column in batch.columns:
        kind = as_bytes(column.type)
        (column if kind == column.type else column.view(kind)).validate(full=True)
