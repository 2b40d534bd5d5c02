"""Values of Arrow's lists and structs, in which conversations are stored."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

# The names of the Python types that have no JSON form; transformers gives a template the name
# instead of such a value.
_OTHER = (
    (pa.types.is_timestamp, "datetime"),
    (pa.types.is_date, "date"),
    (pa.types.is_time, "time"),
    (pa.types.is_duration, "timedelta"),
    (pa.types.is_decimal, "Decimal"),
    (pa.types.is_binary, "bytes"),
    (pa.types.is_large_binary, "bytes"),
    (pa.types.is_fixed_size_binary, "bytes"),
)
_PLAIN = (
    pa.types.is_null,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def is_nested_text(kind: pa.DataType) -> bool:
    """Return whether `nested_values` can convert a column of this type, a list or a struct."""
    if _is_list(kind):
        return _is_convertible(kind.value_type)
    if not pa.types.is_struct(kind):
        return False
    names = [field.name for field in kind]
    return len(set(names)) == len(names) and all(_is_convertible(field.type) for field in kind)


def nested_values(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column as lists and dicts; a byte that is not UTF-8 is a lone
    surrogate in its text."""
    return [value for array in column.chunks for value in _values(array)]


def as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return the type with bytes instead of text, in lists and structs, too."""
    if kind in (pa.string(), pa.large_string()):
        return pa.binary() if kind == pa.string() else pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(_field_as_bytes(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([_field_as_bytes(field) for field in kind])
    return kind


def _field_as_bytes(field: pa.Field) -> pa.Field:
    return field.with_type(as_bytes(field.type))


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in _LISTS)


def _is_convertible(kind: pa.DataType) -> bool:
    known = any(test(kind) for test in (*_PLAIN, *(test for test, _ in _OTHER)))
    return known or is_text(kind) or is_nested_text(kind)


def _values(array: pa.Array) -> list[Any]:
    kind = array.type
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        fields = [_values(each) for each in array.flatten()]
        rows = zip(*fields, strict=True) if fields else iter([()] * len(array))
        return [
            dict(zip(names, row, strict=True)) if valid else None
            for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)
        ]
    if _is_list(kind):
        values = iter(_values(array.flatten()))
        sizes = pc.list_value_length(array).to_pylist()
        return [None if size is None else list(islice(values, size)) for size in sizes]
    other = next((f"<{name}>" for test, name in _OTHER if test(kind)), None)
    if other is not None:
        return [other if valid else None for valid in array.is_valid().to_pylist()]
    try:
        return array.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_text(scalar) for scalar in array]


def _text(scalar: pa.Scalar) -> str | None:
    buffer = scalar.as_buffer()
    return None if buffer is None else buffer.to_pybytes().decode(errors="surrogateescape")
