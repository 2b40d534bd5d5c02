"""Read Parquet files a few rows at a time, whatever the size of their row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megaphase.data_tools.text.chunk import TextChunk, TextPosition
from megaphase.data_tools.text.input_files import InputPath
from megaphase.data_tools.text.rows import (
    MOST_ROWS_OF_CHUNK,
    ROWS_AT_ONCE,
    columns_to_read,
    damage_named,
    serialized,
)

_READ_BUFFER_BYTES = 1 << 18


def parquet_chunks(
    path: InputPath,
    content: Path | BinaryIO,
    keys: Sequence[str],
    start: TextPosition,
    begin: int,
    end: int | None,
    chunk_bytes: int,
) -> Iterator[TextChunk]:
    """Yield the chunks of a Parquet file, see `read_chunks`; read only the row groups needed.

    content: a remote file, open for reading, or the path of another. Also raises InputError if two
    columns of the file have the same requested name.
    """
    with (
        damage_named(path, "Parquet"),
        # Without a buffer, or with pre_buffer, pyarrow keeps a whole row group in memory.
        pq.ParquetFile(
            content,
            buffer_size=_READ_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,  # of files that have checksums
        ) as file,
    ):
        columns = columns_to_read(path, file.schema_arrow, keys)
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


class _RowGroup:
    """A row group: its rows and the position of its bytes in the file."""

    def __init__(self, file: pq.ParquetFile, number: int, row: int, begin: int) -> None:
        self._file, self._number = file, number
        self._metadata = file.metadata.row_group(number)
        self._columns = [self._metadata.column(i) for i in range(self._metadata.num_columns)]
        self.row, self.begin = row, begin
        self.rows: int = self._metadata.num_rows
        self.bytes: int = sum(column.total_compressed_size for column in self._columns)

    def chunks(
        self, path: InputPath, columns: Sequence[str], chunk_bytes: int
    ) -> Iterator[TextChunk]:
        names = self._file.schema_arrow.names
        row = self.row
        for batches in self._batches(columns, chunk_bytes):
            after = row + sum(batch.num_rows for batch in batches)
            begin, end = self._bytes_before(row), self._bytes_before(after)
            yield TextChunk(
                path=path,
                start=TextPosition(row, row + 1),
                end=TextPosition(after, after + 1),
                data=serialized(batches, names),
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
            if size >= chunk_bytes or rows >= MOST_ROWS_OF_CHUNK:
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
        return max(1, min(chunk_bytes * self.rows // max(size, 1), ROWS_AT_ONCE))

    def _bytes_before(self, row: int) -> int:
        return self.begin + self.bytes * (row - self.row) // max(self.rows, 1)
