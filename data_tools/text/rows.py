"""Rows of Parquet and Arrow files: their columns, and chunks of them as Arrow IPC streams."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from megaphase.data_tools.text.chunk import TextChunk
from megaphase.data_tools.text.input_files import InputPath
from megaphase.data_tools.text.nested_rows import is_nested_text, is_text, nested_values
from megaphase.data_tools.text.reading import ID_KEY
from megaphase.utils.errors import InputError

# Only a few rows at a time: repeated texts take less space in the file than in memory.
ROWS_AT_ONCE = 64
MOST_ROWS_OF_CHUNK = 4096
_COLUMNS_KEY = b"columns"


@contextmanager
def damage_named(path: InputPath, form: str) -> Iterator[None]:
    """Turn pyarrow's errors into an InputError that names the file; form: Parquet or Arrow."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Errors of the operating system have an errno; pyarrow also raises its own errors as
        # OSError. UnicodeDecodeError occurs for column names.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        problem = f"is truncated or damaged {form} data ({' '.join(str(error).split())})"
        raise InputError(path, problem, "copy or write it again") from None


def columns_to_read(path: InputPath, schema: pa.Schema, keys: Sequence[str]) -> list[str]:
    """Return the names of the columns to read: those of `keys` that exist, and the column with the
    rows' own ids, if there is one.

    Raises:
        InputError: two columns have the same requested name.
    """
    for name in keys:
        if schema.names.count(name) > 1:
            problem = f"has {schema.names.count(name)} columns with the name {name!r}"
            raise InputError(path, problem, "write it again with one of them")
    return [name for name in [*keys, *_id_column(schema, keys)] if name in schema.names]


def _id_column(schema: pa.Schema, keys: Sequence[str]) -> list[str]:
    if ID_KEY in keys or schema.names.count(ID_KEY) != 1:
        return []
    kind = schema.field(ID_KEY).type
    return [ID_KEY] if is_text(kind) or pa.types.is_integer(kind) else []


def serialized(batches: Sequence[pa.RecordBatch], names: Sequence[str]) -> bytes:
    """Return the `data` of a chunk; `names` are all column names of the file."""
    schema = batches[0].schema.with_metadata({_COLUMNS_KEY: json.dumps(names)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return bytes(sink.getvalue())


def rows_of(chunk: TextChunk, nested: str | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a chunk with the requested columns, and all column names of the file.

    A string that is not UTF-8 is returned as bytes, and a value that is neither a string nor a
    plain number as OtherValue, except for lists and structs in the column `nested`.
    """
    with pa.ipc.open_stream(chunk.data) as stream:
        names = json.loads(stream.schema.metadata[_COLUMNS_KEY])
        columns = stream.read_all()
    rows: list[dict[str, Any]] = [{} for _ in range(columns.num_rows)]
    for name in columns.column_names:
        column = columns[name]
        is_nested = name == nested and is_nested_text(column.type)
        values = nested_values(column) if is_nested else _values(column)
        for row, value in zip(rows, values, strict=True):
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
    if isinstance(column.type, pa.BaseExtensionType) and is_text(column.type.storage_type):
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
        return is_text(kind.value_type)
    return (
        is_text(kind)
        or pa.types.is_null(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        text = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
        return text.as_buffer().to_pybytes()
