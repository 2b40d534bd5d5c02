"""Stream documents from text files, in chunks that can be read independently.

The file's extension, before an optional .gz or .zst, defines what a document is:

| ending                | a document is |
| --------------------- | --- |
| .jsonl .ndjson .json  | a line, a JSON object: the string under a key, several joined, or a pair |
| .parquet              | a row, likewise (never .gz or .zst) |
| .arrow .feather .ipc  | likewise; so are the files of a folder that `datasets` saved |
| .txt                  | the lines up to the next blank line, as in CC-100, or separator line |

A file may be a URL, as in `s3://bucket/en.jsonl.zst`. `-` is
standard input. Text is not changed, except that the newlines around a document of a .txt file are
removed. Blank lines and a byte order mark in a JSONL file are skipped.
"""

from megaphase.data_tools.text.chunk import TextChunk, TextPosition
from megaphase.data_tools.text.chunks import CHUNK_BYTES, check_options, check_reading, read_chunks
from megaphase.data_tools.text.file_types import STDIN, check_text_file, display_name, size_on_disk
from megaphase.data_tools.text.input_files import InputPath, identity, place_of
from megaphase.data_tools.text.inputs import expand_inputs
from megaphase.data_tools.text.ranges import TextRange, can_be_ranged, ranges_of
from megaphase.data_tools.text.reading import Chat, Document, Reading, SourceTarget
from megaphase.data_tools.text.records import (
    InvalidDocument,
    documents_and_wrong_ones,
    identified_and_wrong_ones,
    identified_documents,
    read_documents,
)

__all__ = [
    "CHUNK_BYTES",
    "STDIN",
    "Chat",
    "Document",
    "InputPath",
    "InvalidDocument",
    "Reading",
    "SourceTarget",
    "TextChunk",
    "TextPosition",
    "TextRange",
    "can_be_ranged",
    "check_options",
    "check_reading",
    "check_text_file",
    "display_name",
    "documents_and_wrong_ones",
    "expand_inputs",
    "identified_and_wrong_ones",
    "identified_documents",
    "identity",
    "place_of",
    "ranges_of",
    "read_chunks",
    "read_documents",
    "size_on_disk",
]
