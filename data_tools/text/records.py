"""Parse the documents of a chunk."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import from_json

from megaphase.chats.messages import MESSAGES_REMEDY, messages_fault
from megaphase.data_tools.text.boundaries import Boundaries
from megaphase.data_tools.text.chunk import TextChunk, advance
from megaphase.data_tools.text.file_types import ROW_KINDS, display_name, file_type_of
from megaphase.data_tools.text.reading import ID_KEY, Chat, Document, Reading
from megaphase.utils.errors import InputError
from megaphase.utils.json_values import JSON_TYPES, string_fault

# A worker needs nine bytes of memory per byte of a document; a longer one is probably a mistake.
LARGEST_DOCUMENT_BYTES = 1 << 24
_SHOWN_BYTES = 1 << 10
_MOST_BYTES_OF_CHARACTER = 4


@dataclass(frozen=True)
class InvalidDocument:
    """A document that cannot be read, with the parts of the error message.

    Attributes:
        where: file and line; in Parquet and Arrow, file and row.
        text: the content, of one of more than 16 MB only the beginning; bytes that are not UTF-8
            are written as \\x and two digits.
    """

    where: str
    problem: str
    text: str


def read_documents(chunk: TextChunk, reading: Reading) -> Iterator[Document]:
    """Yield the documents of a chunk: SourceTargets if `reading.pair` is set, texts otherwise.

    Raises InputError as `identified_documents` does.
    """
    return (document for document, _ in identified_documents(chunk, reading))


def identified_documents(chunk: TextChunk, reading: Reading) -> Iterator[tuple[Document, bytes]]:
    """Yield the documents of a chunk, each with its own id in UTF-8: the string or whole number
    under the key `id` of its JSON object or row, or b"" if it has none.

    Raises InputError, naming file and line (in Parquet and Arrow: row), if a line is not UTF-8 or
    not a JSON object, or a key is missing or does not hold a string, or if a document of a text
    file has more than 16 MB.
    """
    kind = file_type_of(chunk.path, reading.stdin_kind)
    ends = Boundaries.of(kind, reading)
    if kind in ROW_KINDS:
        for where, row, names in _rows(chunk, reading):
            yield _document(row, reading, where, names), _id(row)
    elif kind == "jsonl":
        keys = reading.keys
        for number, line in enumerate(_without_mark(chunk).split(b"\n")):
            if line and not line.isspace():
                _check_size(len(line), chunk, number, ends)
                found = _quick_json_document(line, reading, keys)
                yield _json_document(line, reading, chunk, number) if found is None else found
    else:
        for block in re.split(ends.between, f"\n{_decode(_without_mark(chunk), chunk)}"):
            if block and not block.isspace():
                if len(block) > LARGEST_DOCUMENT_BYTES // _MOST_BYTES_OF_CHARACTER:
                    _check_size(len(block.encode()), chunk, 0, ends)
                yield block.strip("\r\n"), b""


def documents_and_wrong_ones(
    chunk: TextChunk, reading: Reading
) -> Iterator[Document | InvalidDocument]:
    """Yield the documents of a chunk, with an InvalidDocument for each one that cannot be read."""
    for found in identified_and_wrong_ones(chunk, reading):
        yield found if isinstance(found, InvalidDocument) else found[0]


def identified_and_wrong_ones(
    chunk: TextChunk, reading: Reading
) -> Iterator[tuple[Document, bytes] | InvalidDocument]:
    """Like `identified_documents`, with an InvalidDocument for each one that cannot be read."""
    try:
        documents = list(identified_documents(chunk, reading))
    except InputError:
        pass
    else:
        yield from documents
        return
    if file_type_of(chunk.path, reading.stdin_kind) in ROW_KINDS:
        yield from _rows_and_wrong_ones(chunk, reading)
        return
    for single in _single_documents(chunk, reading):
        try:
            yield from identified_documents(single, reading)
        except InputError as error:
            is_large = len(single.data) > LARGEST_DOCUMENT_BYTES
            data = single.data[:_SHOWN_BYTES] if is_large else single.data
            text = data.strip(b"\r\n").decode(errors="backslashreplace")
            yield InvalidDocument(error.where, error.problem, text)


def _rows(chunk: TextChunk, reading: Reading) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Yield the place of each row of such a file, the row, and the names of all columns."""
    # pyarrow is an optional dependency.
    from megaphase.data_tools.text.rows import rows_of

    rows, names = rows_of(chunk, reading.messages)
    for number, row in enumerate(rows, start=chunk.first_line):
        yield f"{chunk.path}: row {number}", row, names


def _rows_and_wrong_ones(
    chunk: TextChunk, reading: Reading
) -> Iterator[tuple[Document, bytes] | InvalidDocument]:
    for where, row, names in _rows(chunk, reading):
        try:
            yield _document(row, reading, where, names), _id(row)
        except InputError as error:
            text = json.dumps(row, ensure_ascii=False, default=str)
            yield InvalidDocument(error.where, error.problem, text)


def _single_documents(chunk: TextChunk, reading: Reading) -> Iterator[TextChunk]:
    """Yield each document of a chunk of text as a chunk of its own."""
    ends = Boundaries.of(file_type_of(chunk.path, reading.stdin_kind), reading)
    # A line begins where the chunk begins.
    found = re.finditer(ends.between.encode(), b"\n" + chunk.data)
    position, begin = replace(chunk.start, line=chunk.first_line), 0
    for end in [*(match.end() - 1 for match in found), len(chunk.data)]:
        data = chunk.data[begin:end]
        after = advance(position, len(data), data.count(b"\n"))
        yield TextChunk(chunk.path, position, after, data, chunk.file_begin, 0)
        position, begin = after, end


def _check_size(size: int, chunk: TextChunk, number: int, ends: Boundaries) -> None:
    """Reject a document of so many bytes that begins at line `number` (from 0) or later."""
    if size <= LARGEST_DOCUMENT_BYTES:
        return
    where = f"{display_name(chunk.path)}:{chunk.first_line + number}"
    problem = f"a document of more than {LARGEST_DOCUMENT_BYTES >> 20} MB begins here"
    if ends.line is not None:
        problem += " or soon after"
    raise InputError(where, problem, ends.remedy)


def _without_mark(chunk: TextChunk) -> bytes:
    data = chunk.data
    return data if chunk.start.offset else data.removeprefix(codecs.BOM_UTF8)


def _decode(data: bytes, chunk: TextChunk, number: int = 0) -> str:
    """Decode a chunk, or the part of it that begins with line `number` (from 0)."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = chunk.first_line + number + data.count(b"\n", 0, error.start)
        problem = f"is not UTF-8 text (byte 0x{data[error.start]:02x})"
        where = f"{display_name(chunk.path)}:{line}"
        raise InputError(where, problem, "convert the file to UTF-8") from None


def _id(record: Mapping[str, Any]) -> bytes:
    value = record.get(ID_KEY)
    if type(value) is int:
        return str(value).encode()
    # A lone surrogate, which UTF-8 cannot represent, is written as its escape.
    return value.encode(errors="backslashreplace") if isinstance(value, str) else b""


def _quick_json_document(
    line: bytes, reading: Reading, keys: Sequence[str]
) -> tuple[Document, bytes] | None:
    """Return the document of a line and its id, or None if anything about the line is unusual."""
    if reading.messages is not None:
        return None
    try:
        record = from_json(line, cache_strings="none")
        if all(type(record[key]) is str for key in keys):
            return reading.document(record), _id(record)
    except (ValueError, KeyError, TypeError):
        pass
    return None


def _json_document(
    line: bytes, reading: Reading, chunk: TextChunk, number: int
) -> tuple[Document, bytes]:
    """Parse line `number` (from 0) of a chunk with a slower parser that explains errors."""

    def where() -> str:
        # `first_line` may take long to compute.
        return f"{display_name(chunk.path)}:{chunk.first_line + number}"

    try:
        value = json.loads(_decode(line, chunk, number))
        if isinstance(value, dict):
            return _document(value, reading, "", value, where), _id(value)
        problem = f"is {JSON_TYPES[type(value)]}, not a JSON object"
        remedy = "write {" + ", ".join(f'"{key}": "..."' for key in reading.keys) + "}"
    except InputError as error:
        if error.where:
            raise
        problem, remedy = error.problem, error.remedy
    except (ValueError, RecursionError) as error:
        problem = f"is not valid JSON ({getattr(error, 'msg', 'it cannot be parsed')})"
        remedy = "each line must be one JSON object"
    raise InputError(where(), problem, remedy)


def _document(
    record: dict[str, Any],
    reading: Reading,
    where: str,
    names: Iterable[str],
    place: Callable[[], str] | None = None,
) -> Document:
    """Return the document of a record.

    names: all of its keys, including those not read. place: computes the record's place, if
    `where` does not have it.
    """
    for key in reading.keys:
        if key not in record:
            there = ", ".join(map(repr, names)) or "none"
            problem = f"the key {key!r} is missing; the keys are {there}"
            raise InputError(where, problem, f"choose with {reading.key_option}")
        if reading.messages is not None:
            _check_messages(record[key], key, where)
        elif fault := string_fault(record[key]):
            strings = ", ".join(repr(name) for name, it in record.items() if isinstance(it, str))
            remedy = f"the keys with a string are {strings}" if strings else "no key holds a string"
            raise InputError(where, f"the key {key!r} holds {fault}", remedy)
    if reading.messages is not None:
        return Chat(record[reading.messages], place or (lambda: where))
    return reading.document(record)


def _check_messages(messages: Any, key: str, where: str) -> None:
    """Reject a value that is not a list of messages."""
    if fault := messages_fault(messages):
        raise InputError(where, f"the key {key!r} holds {fault}", MESSAGES_REMEDY)
