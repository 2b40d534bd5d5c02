"""Read compressed files, and report those that are truncated or damaged."""

from __future__ import annotations

import gzip
import importlib.util
import os
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import zstandard

from megaphase.data_tools.text.file_types import display_name
from megaphase.data_tools.text.input_files import InputPath
from megaphase.data_tools.text.prefetch import prefetched
from megaphase.utils.errors import InputError

_WITH_ISAL = importlib.util.find_spec("isal") is not None  # the extra `gzip`

_PIECE_BYTES, _LARGE_PIECE_BYTES = 1 << 18, 1 << 20
_PIECES_AHEAD = 3
# A piece is expanded at once, and repetitive text expands to many times its compressed size.
_ZSTD_PIECE_BYTES, _LARGEST_ZSTD_PIECE_BYTES = 1 << 12, 1 << 18
# As zstd --long=31; by default, windows larger than 128 MB are refused.
_LARGEST_ZSTD_WINDOW = 1 << 31


def decompressed(file: BinaryIO, suffix: str) -> Generator[tuple[bytes, int], None, None]:
    """Yield the decompressed content of a file with the extension `suffix`, .gz or .zst, and after
    how many bytes of the file each piece was complete, which does not depend on what is installed.

    Raises EOFError if the file is truncated. An empty file counts as truncated, since compressing
    nothing writes a header.
    """
    for piece in _pieces(file, suffix, fast=False):
        yield piece, file.tell()


def decompressed_ahead(file: BinaryIO, suffix: str) -> Generator[tuple[bytes, int], None, None]:
    """Like `decompressed`, as fast as possible: by ISA-L if it is installed, and in another thread
    while the last piece is used. The positions are approximate."""

    def pieces() -> Generator[tuple[bytes, int], None, None]:
        for piece in _pieces(file, suffix, fast=True):
            yield piece, file.tell()

    yield from prefetched(pieces(), _PIECES_AHEAD)


def _pieces(file: BinaryIO, suffix: str, *, fast: bool) -> Iterator[bytes]:
    if file.seek(0, os.SEEK_END) == 0:
        raise EOFError
    file.seek(0)
    if suffix.lower() == ".zst":
        return _zstd_pieces(file, _LARGEST_ZSTD_PIECE_BYTES if fast else _ZSTD_PIECE_BYTES)
    if fast and _WITH_ISAL:
        return _isal_pieces(file)
    return _read_pieces(gzip.GzipFile(fileobj=file))


def _isal_pieces(file: BinaryIO) -> Iterator[bytes]:
    """Decompress by ISA-L; of a damaged file, raise what `gzip` finds."""
    from isal import igzip, isal_zlib

    open_stream: Any = igzip.IGzipFile
    faults: Any = (EOFError, gzip.BadGzipFile, isal_zlib.error)
    try:
        yield from _read_pieces(open_stream(fileobj=file, mode="rb"), _LARGE_PIECE_BYTES)
    except faults as error:
        file.seek(0)
        for _ in _read_pieces(gzip.GzipFile(fileobj=file)):
            pass
        raise zlib.error(str(error)) from None


def _read_pieces(
    stream: BinaryIO | gzip.GzipFile, piece_bytes: int = _PIECE_BYTES
) -> Iterator[bytes]:
    while piece := stream.read(piece_bytes):
        yield piece


def _zstd_pieces(file: BinaryIO, largest_piece: int) -> Iterator[bytes]:
    """Decompress frame after frame; unlike zstandard's reader, raise EOFError on truncation."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW)
    frame = None
    wanted = _ZSTD_PIECE_BYTES
    while compressed := file.read(wanted):
        size = len(compressed)
        while compressed:
            frame = frame or decompressor.decompressobj()
            piece = frame.decompress(compressed)
            yield piece
            compressed = b""
            if frame.eof:
                compressed, frame = frame.unused_data, None
        # As many bytes as expand to a piece, if the next ones are like these.
        expected = size * _LARGE_PIECE_BYTES // max(len(piece), 1)
        wanted = max(min(expected, 2 * size, largest_piece), _ZSTD_PIECE_BYTES)
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
