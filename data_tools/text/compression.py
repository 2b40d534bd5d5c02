"""Read compressed files, and report those that are truncated or damaged."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import zstandard

from megaphase.data_tools.text.file_types import display_name
from megaphase.data_tools.text.input_files import InputPath
from megaphase.utils.errors import InputError

_PIECE_BYTES = 1 << 18
# A piece is expanded at once, and repetitive text expands to many times its compressed size.
_ZSTD_PIECE_BYTES = 1 << 12
# As zstd --long=31; by default, windows larger than 128 MB are refused.
_LARGEST_ZSTD_WINDOW = 1 << 31


def decompressed(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    """Yield the decompressed content of a file with the extension `suffix`, .gz or .zst.

    Raises EOFError if the file is truncated. An empty file counts as truncated, since compressing
    nothing writes a header.
    """
    if file.seek(0, os.SEEK_END) == 0:
        raise EOFError
    file.seek(0)
    if suffix.lower() == ".zst":
        yield from _zstd_pieces(file)
        return
    stream = gzip.GzipFile(fileobj=file)
    while piece := stream.read(_PIECE_BYTES):
        yield piece


def _zstd_pieces(file: BinaryIO) -> Iterator[bytes]:
    """Decompress frame after frame; unlike zstandard's reader, raise EOFError on truncation."""
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
def named_errors(path: InputPath) -> Iterator[None]:
    """Turn errors of reading into InputErrors that name the file."""
    try:
        yield
    except EOFError:
        raise InputError(path, "is truncated", "copy or compress it again") from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        kind = {".gz": "gzip", ".zst": "zstd"}[path.suffix.lower()]
        problem = f"is damaged {kind} data ({' '.join(str(error).split())})"
        raise InputError(path, problem, "copy or compress it again") from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError(display_name(path), problem, "check the file") from None
