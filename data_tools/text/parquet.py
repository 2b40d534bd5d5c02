"""Read Parquet files a few rows at a time, whatever the size of their row groups."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megaphase.data_tools.text.chunk import TextChunk, TextPosition
from megaphase.data_tools.text.reading import ID_KEY
from megaphase.utils.errors import InputError

# Only a few rows at a time: repeated texts take less space in the file than in memory.
_ROWS_AT_ONCE = 64
_MOST_ROWS_OF_CHUNK = 4096
_READ_BUFFER_BYTES = 1 << 18
_COLUMNS_KEY = b"columns"


def parquet_chunks(
    path: Path,
    columns: Sequence[str],
    start: TextPosition,
    begin: int,
    end: int | None,
    chunk_bytes: int,
) -> Iterator[TextChunk]:
    """Yield the chunks of a Parquet file, see `read_chunks`; read only the row groups needed.

    Also raises InputError if two columns of the file have the same requested name.
    """
    try:
        # Without a buffer, or with pre_buffer, pyarrow keeps a whole row group in memory.
        with pq.ParquetFile(
            path,
            buffer_size=_READ_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,  # of files that have checksums
        ) as file:
            _check_columns(path, file, columns)
            columns = [*columns, *_id_column(file, columns)]
            row = disk = 0
            for number in range(file.num_row_groups):
                group = _RowGroup(file, number, row, disk)
                row, disk = group.row + group.rows, group.begin + group.bytes
                if end is not None and group.begin >= end:
                    return
                if row <= start.offset or disk <= begin:
                    continue
                for chunk in group.chunks(path, columns, chunk_bytes):
                    if end is not None and chunk.file_begin >= end:
                        return
                    if chunk.file_begin >= begin and chunk.end.offset > start.offset:
                        yield chunk
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Errors of the operating system have an errno; pyarrow also raises its own errors as
        # OSError. UnicodeDecodeError occurs for column names.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        problem = f"is truncated or damaged Parquet data ({' '.join(str(error).split())})"
        raise InputError(path, problem, "copy or write it again") from None


def _check_columns(path: Path, file: pq.ParquetFile, columns: Sequence[str]) -> None:
    names = file.schema_arrow.names
    for name in columns:
        if names.count(name) > 1:
            problem = f"has {names.count(name)} columns with the name {name!r}"
            raise InputError(path, problem, "write it again with one of them")


def _id_column(file: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    """Return the column with the rows' own ids, if there is one that is not among `columns`."""
    schema = file.schema_arrow
    if ID_KEY in columns or schema.names.count(ID_KEY) != 1:
        return []
    kind = schema.field(ID_KEY).type
    return [ID_KEY] if _is_text(kind) or pa.types.is_integer(kind) else []


def rows_of(chunk: TextChunk) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a chunk with the requested columns, and all column names of the file.

    A string that is not UTF-8 is returned as bytes, and a value that is neither a string nor a
    plain number as OtherValue.
    """
    with pa.ipc.open_stream(chunk.data) as stream:
        names = json.loads(stream.schema.metadata[_COLUMNS_KEY])
        columns = stream.read_all()
    rows: list[dict[str, Any]] = [{} for _ in range(columns.num_rows)]
    for name in columns.column_names:
        for row, value in zip(rows, _values(columns[name]), strict=True):
            row[name] = value
    return rows, names


@dataclass(frozen=True)
class OtherValue:
    """A value that is not text, of an Arrow type that need not have a Python equivalent."""

    type: str

    def __str__(self) -> str:
        return self.type


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Convert a column to Python values; values that are not text only if that cannot fail."""
    if isinstance(column.type, pa.BaseExtensionType) and _is_text(column.type.storage_type):
        column = column.cast(column.type.storage_type)
    if not _has_python_values(column.type):
        other = OtherValue(str(column.type))
        return [other if valid else None for valid in column.is_valid().to_pylist()]
    try:
        values: list[Any] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _has_python_values(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return (
        _is_text(kind)
        or pa.types.is_null(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        text = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
        return text.as_buffer().to_pybytes()


class _RowGroup:
    """A row group: its rows and the position of its bytes in the file."""

    def __init__(self, file: pq.ParquetFile, number: int, row: int, begin: int) -> None:
        self._file, self._number = file, number
        self._metadata = file.metadata.row_group(number)
        self._columns = [self._metadata.column(i) for i in range(self._metadata.num_columns)]
        self.row, self.begin = row, begin
        self.rows: int = self._metadata.num_rows
        self.bytes: int = sum(column.total_compressed_size for column in self._columns)

    def chunks(self, path: Path, columns: Sequence[str], chunk_bytes: int) -> Iterator[TextChunk]:
        names = self._file.schema_arrow.names
        row = self.row
        for batches in self._batches([name for name in columns if name in names], chunk_bytes):
            after = row + sum(batch.num_rows for batch in batches)
            begin, end = self._bytes_before(row), self._bytes_before(after)
            yield TextChunk(
                path=path,
                start=TextPosition(row, row + 1),
                end=TextPosition(after, after + 1),
                data=_serialized(batches, names),
                file_begin=begin,
                file_bytes=end - begin,
            )
            row = after

    def _batches(self, columns: Sequence[str], chunk_bytes: int) -> Iterator[list[pa.RecordBatch]]:
        """Yield record batches of the columns, about `chunk_bytes` at a time."""
        pending: list[pa.RecordBatch] = []
        for batch in self._file.iter_batches(
            self._rows_at_once(columns, chunk_bytes),
            row_groups=[self._number],
            columns=columns,
            use_threads=False,
        ):
            pending.append(batch)
            rows = sum(batch.num_rows for batch in pending)
            size = sum(batch.nbytes for batch in pending)
            if size >= chunk_bytes or rows >= _MOST_ROWS_OF_CHUNK:
                yield pending
                pending = []
        if pending:
            yield pending

    def _rows_at_once(self, columns: Sequence[str], chunk_bytes: int) -> int:
        size: int = sum(
            column.total_uncompressed_size
            for column in self._columns
            if column.path_in_schema.split(".")[0] in columns
        )
        return max(1, min(chunk_bytes * self.rows // max(size, 1), _ROWS_AT_ONCE))

    def _bytes_before(self, row: int) -> int:
        return self.begin + self.bytes * (row - self.row) // max(self.rows, 1)


def _serialized(batches: Sequence[pa.RecordBatch], names: Sequence[str]) -> bytes:
    schema = batches[0].schema.with_metadata({_COLUMNS_KEY: json.dumps(names)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return bytes(sink.getvalue())
