"""Rows of Parquet files, a few at a time whatever the size of the row groups."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megaphase.data_tools.text.chunk import Position, TextChunk
from megaphase.errors import InputError

# Where the compressed text is much smaller than it will be, rows look smaller than they are.
_MOST_ROWS = 4096
_READ_BUFFER_BYTES = 1 << 18
_COLUMNS_KEY = b"columns"


def parquet_chunks(
    path: Path,
    columns: Sequence[str],
    start: Position,
    begin: int,
    end: int | None,
    chunk_bytes: int,
) -> Iterator[TextChunk]:
    """The chunks of a Parquet file, see `read_chunks`; only the row groups needed are read."""
    try:
        # Without a buffer, or with pre_buffer, a whole row group is held in memory.
        with pq.ParquetFile(path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False) as file:
            row = disk = 0
            for number in range(file.num_row_groups):
                group = _RowGroup(file, number, row, disk)
                row, disk = group.row + group.rows, group.begin + group.bytes
                if row > start.offset and disk > begin and (end is None or group.begin < end):
                    for chunk in group.chunks(path, columns, chunk_bytes):
                        if end is not None and chunk.file_begin >= end:
                            return
                        if chunk.file_begin >= begin and chunk.end.offset > start.offset:
                            yield chunk
    except pa.ArrowException as error:
        problem = f"is cut off or not whole Parquet data ({' '.join(str(error).split())})"
        raise InputError(path, problem, "copy or write it again") from None


def rows_of(chunk: TextChunk) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a chunk, of the columns asked for, and the names of all the file's columns.

    A string that is not UTF-8 is given as bytes.
    """
    with pa.ipc.open_stream(chunk.data) as stream:
        names = json.loads(stream.schema.metadata[_COLUMNS_KEY])
        columns = stream.read_all()
    rows: list[dict[str, Any]] = [{} for _ in range(columns.num_rows)]
    for name in columns.column_names:
        for row, value in zip(rows, _values(columns[name]), strict=True):
            row[name] = value
    return rows, names


def _values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


class _RowGroup:
    """One row group: which rows it has, and where its bytes lie."""

    def __init__(self, file: pq.ParquetFile, number: int, row: int, begin: int) -> None:
        self._file, self._number = file, number
        self._metadata = file.metadata.row_group(number)
        self._columns = [self._metadata.column(i) for i in range(self._metadata.num_columns)]
        self.row, self.begin = row, begin
        self.rows = self._metadata.num_rows
        self.bytes = sum(column.total_compressed_size for column in self._columns)

    def chunks(self, path: Path, columns: Sequence[str], chunk_bytes: int) -> Iterator[TextChunk]:
        names = self._file.schema_arrow.names
        chosen = [name for name in columns if name in names]
        row = self.row
        for batch in self._file.iter_batches(
            self._rows_at_once(chosen, chunk_bytes),
            row_groups=[self._number],
            columns=chosen,
            use_threads=False,
        ):
            after = row + batch.num_rows
            begin, end = self._bytes_before(row), self._bytes_before(after)
            data = _serialized(batch, names)
            yield TextChunk(
                path, Position(row, row + 1), Position(after, after + 1), data, begin, end - begin
            )
            row = after

    def _rows_at_once(self, columns: Sequence[str], chunk_bytes: int) -> int:
        size = sum(
            column.total_uncompressed_size
            for column in self._columns
            if column.path_in_schema.split(".")[0] in columns
        )
        return max(1, min(chunk_bytes * self.rows // max(size, 1), _MOST_ROWS))

    def _bytes_before(self, row: int) -> int:
        return self.begin + self.bytes * (row - self.row) // max(self.rows, 1)


def _serialized(batch: pa.RecordBatch, names: Sequence[str]) -> bytes:
    batch = batch.replace_schema_metadata({_COLUMNS_KEY: json.dumps(names)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()
