"""Documents from text files, streamed.

What a document is depends on the file's ending, before an optional .gz or .zst:

| ending                | a document is |
| --------------------- | --- |
| .jsonl .ndjson .json  | the string under one key of a line; each line is a JSON object |
| .txt                  | the lines up to the next blank line, as in CC-100 |

Text is taken as it stands, apart from the newlines around a document of a .txt file. Blank lines
of a JSONL file are passed over, and so is a byte order mark.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from megaphase.errors import InputError

CHUNK_BYTES = 1 << 20
LARGEST_DOCUMENT_BYTES = 1 << 28

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
TEXT_ENDING = ".txt"
COMPRESSED_ENDINGS = (".gz", ".zst")

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_BLANK_LINE_BYTES = re.compile(_BLANK_LINES.pattern.encode())
_LINE_END = re.compile(b"\n")
_PIECE_BYTES = 1 << 18
# All that a piece expands to comes at once, and text of much repetition expands a lot.
_ZSTD_PIECE_BYTES = 1 << 12
# zstd --long=31; without it larger windows than 128 MB are refused.
_LARGEST_ZSTD_WINDOW = 1 << 31
_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


@dataclass(frozen=True)
class TextChunk:
    """Some whole documents of a file, not decoded yet.

    Attributes:
        path: the file.
        first_line: number of the chunk's first line in the file, from 1.
        data: the lines, decompressed.
        file_bytes: how much of the file, as it lies on the disk, was read for this chunk.
    """

    path: Path
    first_line: int
    data: bytes
    file_bytes: int


@dataclass(frozen=True)
class WrongDocument:
    """A document that cannot be read, as an error would describe it.

    Attributes:
        where: file and line.
        text: what stands there; bytes that are not UTF-8 are written as \\x and two digits.
    """

    where: str
    problem: str
    text: str


def check_text_file(path: Path) -> None:
    """Raise InputError where `path` is no file or its ending is not one of those above."""
    if os.path.isdir(path):
        raise InputError(path, "is a directory", "give the files in it")
    if not os.path.exists(path):
        raise InputError(path, "no such file", "check the path")
    if not os.path.isfile(path):
        raise InputError(path, "is not a regular file", "write the text to a file first")
    if _ending(path) not in (*JSON_ENDINGS, TEXT_ENDING):
        known = ", ".join((*JSON_ENDINGS, TEXT_ENDING))
        raise InputError(path, "unknown kind of file", f"its name must end in {known} [.gz|.zst]")


def read_chunks(path: Path, chunk_bytes: int = CHUNK_BYTES) -> Iterator[TextChunk]:
    """Cut a file into pieces of about `chunk_bytes` that hold whole documents.

    Raises InputError where the file cannot be read, is compressed and broken or cut off, or holds
    a document of more than 256 MB.
    """
    check_text_file(path)
    ends = (b"\n",) if _ending(path) in JSON_ENDINGS else (b"\n\n", b"\n\r\n")
    buffer = bytearray()
    line, position, searched = 1, 0, chunk_bytes
    with _named_errors(path), open(path, "rb") as file:
        for piece in _decompressed(file, path.suffix):
            buffer += piece
            while cut := _first_end(buffer, ends, searched):
                data = bytes(buffer[:cut])
                del buffer[:cut]
                yield TextChunk(path, line, data, file.tell() - position)
                line += data.count(b"\n")
                position, searched = file.tell(), chunk_bytes
            searched = max(searched, len(buffer))
            if len(buffer) > chunk_bytes + LARGEST_DOCUMENT_BYTES:
                raise InputError(f"{path}:{line}", *_too_large(path))
        if buffer or file.tell() > position:
            yield TextChunk(path, line, bytes(buffer), file.tell() - position)


def documents_of(chunk: TextChunk, json_key: str) -> Iterator[str]:
    """The text of each document of a chunk.

    Raises InputError, naming file and line, where a line is not UTF-8 or not a JSON object, or
    `json_key` is missing from it or holds something else than a string.
    """
    text = _decode(chunk)
    if _ending(chunk.path) in JSON_ENDINGS:
        for number, line in enumerate(text.split("\n"), start=chunk.first_line):
            if line and not line.isspace():
                yield _json_text(line, json_key, f"{chunk.path}:{number}")
    else:
        for block in _BLANK_LINES.split(f"\n{text}"):
            if block and not block.isspace():
                yield block.strip("\r\n")


def documents_and_wrong_ones(chunk: TextChunk, json_key: str) -> Iterator[str | WrongDocument]:
    """The text of each document of a chunk, or what is wrong with it."""
    try:
        documents = list(documents_of(chunk, json_key))
    except InputError:
        pass
    else:
        yield from documents
        return
    for single in _single_documents(chunk):
        try:
            yield from documents_of(single, json_key)
        except InputError as error:
            text = single.data.strip(b"\r\n").decode(errors="backslashreplace")
            yield WrongDocument(error.where, error.problem, text)


def _single_documents(chunk: TextChunk) -> Iterator[TextChunk]:
    """A chunk for every document."""
    between = _LINE_END if _ending(chunk.path) in JSON_ENDINGS else _BLANK_LINE_BYTES
    line, start = chunk.first_line, 0
    for end in [*(match.end() for match in between.finditer(chunk.data)), len(chunk.data)]:
        data = chunk.data[start:end]
        yield TextChunk(chunk.path, line, data, 0)
        line, start = line + data.count(b"\n"), end


def _ending(path: Path) -> str:
    """The file's ending in small letters, without that of a compression."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED_ENDINGS else name.suffix


def _first_end(buffer: bytearray, ends: tuple[bytes, ...], least: int) -> int:
    """Where a document ends for the first time at `least` or later; 0 where none does."""
    found = ((buffer.find(end, max(least - len(end), 0)), end) for end in ends)
    return min((at + len(end) for at, end in found if at >= 0), default=0)


def _too_large(path: Path) -> tuple[str, str]:
    problem = f"a document of more than {LARGEST_DOCUMENT_BYTES >> 20} MB begins here or soon after"
    if _ending(path) == TEXT_ENDING:
        return problem, "put a blank line between documents, or use JSONL"
    return problem, "split it"


def _decompressed(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    if suffix.lower() == ".zst":
        yield from _zstd_pieces(file)
        return
    stream = gzip.GzipFile(fileobj=file) if suffix.lower() == ".gz" else file
    while piece := stream.read(_PIECE_BYTES):
        yield piece


def _zstd_pieces(file: BinaryIO) -> Iterator[bytes]:
    """Decompress frame after frame; unlike zstandard's own reader, notice one that is cut off."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW)
    frame = None
    while compressed := file.read(_ZSTD_PIECE_BYTES):
        while compressed:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(compressed)
            compressed = b""
            if frame.eof:
                compressed, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn what can go wrong in reading into InputErrors that name the file."""
    try:
        yield
    except EOFError:
        raise InputError(path, "is cut off", "copy or compress it again") from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        kind = {".gz": "gzip", ".zst": "zstd"}[path.suffix.lower()]
        problem = f"is not whole {kind} data ({' '.join(str(error).split())})"
        raise InputError(path, problem, "copy or compress it again") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check the file") from None


def _decode(chunk: TextChunk) -> str:
    data = chunk.data
    if chunk.first_line == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = chunk.first_line + data.count(b"\n", 0, error.start)
        problem = f"is not UTF-8 text (byte 0x{data[error.start]:02x})"
        raise InputError(f"{chunk.path}:{line}", problem, "convert the file to UTF-8") from None


def _json_text(line: str, key: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "it cannot be parsed")
        remedy = "each line must be one JSON object"
        raise InputError(where, f"is not valid JSON ({reason})", remedy) from None
    if not isinstance(value, dict):
        problem = f"is {_JSON_TYPES[type(value)]}, not a JSON object"
        raise InputError(where, problem, f'write {{"{key}": "..."}}')
    if key not in value:
        there = ", ".join(map(repr, value)) or "none"
        problem = f"the key {key!r} is missing; the keys there are {there}"
        raise InputError(where, problem, "choose one with --json-key")
    text = value[key]
    if not isinstance(text, str):
        there = ", ".join(repr(name) for name, other in value.items() if isinstance(other, str))
        problem = f"the key {key!r} holds {_JSON_TYPES[type(text)]}, not a string"
        remedy = f"the keys with a string are {there}" if there else "no key there holds a string"
        raise InputError(where, problem, remedy)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"holds half a character, \\u{ord(text[error.start]):04x}"
        raise InputError(where, problem, "mend the program that wrote it") from None
    return text
