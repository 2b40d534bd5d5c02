"""The binary format of Megatron-LM's MMIDIDX index, and the digests of a document.

Little-endian and without padding: 9 bytes of magic, u64 version, u8 code of the tokens' dtype,
u64 number of sequences S, u64 length of document_indices (documents + 1); then i32[S] lengths in
tokens, i64[S] byte offsets into the .bin, i64[documents + 1] document_indices: the index of each
document's first sequence. Corpora written by Megaphase have one sequence per document.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megaphase.corpus._checksums import BLOCK_BYTES
from megaphase.utils.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

LENGTH_DTYPE = np.dtype("<i4")
OFFSET_DTYPE = np.dtype("<i8")
HASH_DTYPE = np.dtype("<u8")
SUM_DTYPE = np.dtype([("text_bytes", "<u4"), ("checksum", "<u4")])
BLOCK_DTYPE = np.dtype("<u4")
DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}

# Megatron-LM's limit for two-byte tokens.
LARGEST_U16_VOCAB = 65_500

_CHUNK_ITEMS = 1 << 18
_REMEDY = "tokenize again"


@dataclass(frozen=True)
class Index:
    """An .idx file; the arrays are memory-mapped and, since they begin at byte 34, not aligned.

    Attributes:
        dtype: dtype of the tokens in the .bin.
        lengths: i32 [sequences], in tokens.
        byte_offsets: i64 [sequences], position of each sequence in the .bin.
        document_indices: i64 [documents + 1], from 0 to the number of sequences.
    """

    dtype: np.dtype
    lengths: np.ndarray
    byte_offsets: np.ndarray
    document_indices: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype in which Megatron-LM stores the tokens of a vocabulary of this size."""
    return np.dtype("<u2") if vocab_size < LARGEST_U16_VOCAB else np.dtype("<i4")


def document_hash(utf8: bytes) -> bytes:
    """Return the BLAKE2b-64 digest of a document's UTF-8 text, the 8 bytes stored in .hash."""
    return hashlib.blake2b(utf8, digest_size=HASH_DTYPE.itemsize).digest()


def document_checksum(tokens: Any, text_hash: int, text_bytes: int) -> int:
    """Return a 32-bit checksum of a document's tokens, as they are stored, and of the hash and the
    size in bytes of its text."""
    seed = (text_hash + text_bytes) & 0xFFFFFFFFFFFFFFFF
    return xxhash.xxh3_64_intdigest(tokens, seed) & 0xFFFFFFFF


def blocks_of(size: int) -> int:
    """Return the number of blocks of a .bin of `size` bytes; the last block may be shorter."""
    return -(-size // BLOCK_BYTES)


def read_index(path: Path) -> Index:
    """Map an .idx file into memory.

    Only the header and the ends of the arrays are checked, so not all of the file is read. Raises
    InputError if the file is missing, truncated or too long, or of an unknown format, version or
    token dtype.
    """
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise InputError(path, "no such file", _REMEDY)
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise InputError(path, "is not a Megatron-LM index (MMIDIDX)", _REMEDY)
    if len(header) < HEADER.size:
        raise InputError(path, f"is truncated: {size} bytes, the header alone has 34", _REMEDY)
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != VERSION:
        raise InputError(path, f"is of version {version}, only {VERSION} can be read", _REMEDY)
    if code not in DTYPE_OF_CODE:
        raise InputError(path, f"has the unknown token dtype code {code}", _REMEDY)
    if DTYPE_OF_CODE[code].kind == "f":
        raise InputError(path, f"holds {DTYPE_OF_CODE[code]} numbers, not tokens", _REMEDY)

    lengths_end = HEADER.size + sequences * LENGTH_DTYPE.itemsize
    offsets_end = lengths_end + sequences * OFFSET_DTYPE.itemsize
    expected = offsets_end + boundaries * OFFSET_DTYPE.itemsize
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise InputError(path, f"is {fault}: {size} bytes, its header says {expected}", _REMEDY)

    mapped = np.memmap(str(path), dtype=np.uint8, mode="r")
    index = Index(
        dtype=DTYPE_OF_CODE[code],
        lengths=mapped[HEADER.size : lengths_end].view(LENGTH_DTYPE),
        byte_offsets=mapped[lengths_end:offsets_end].view(OFFSET_DTYPE),
        document_indices=mapped[offsets_end:].view(OFFSET_DTYPE),
    )
    if boundaries < 1 or index.document_indices[0] != 0 or index.document_indices[-1] != sequences:
        raise InputError(path, f"its documents do not span its {sequences} sequences", _REMEDY)
    return index


def index_bytes(sequences: int, documents: int) -> int:
    """Return the size of an .idx file."""
    of_sequence = LENGTH_DTYPE.itemsize + OFFSET_DTYPE.itemsize
    return HEADER.size + sequences * of_sequence + (documents + 1) * OFFSET_DTYPE.itemsize


def map_index(path: Path, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """Map lengths and byte offsets [sequences] of an .idx file that has been checked."""
    lengths_end = HEADER.size + sequences * LENGTH_DTYPE.itemsize
    offsets_end = lengths_end + sequences * OFFSET_DTYPE.itemsize
    mapped = np.memmap(str(path), dtype=np.uint8, mode="r")
    return (
        mapped[HEADER.size : lengths_end].view(LENGTH_DTYPE),
        mapped[lengths_end:offsets_end].view(OFFSET_DTYPE),
    )


def write_index(write: Callable[[Any], object], dtype: np.dtype, lengths: np.ndarray) -> None:
    """Write an index with one sequence per document, in chunks.

    Args:
        write: is called with consecutive pieces of the file.
        dtype: dtype of the tokens in the .bin.
        lengths: i32 [documents], in tokens, EOD included; may be memory-mapped.
    """
    documents = len(lengths)
    write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[np.dtype(dtype)], documents, documents + 1))
    for chunk in _chunks(lengths):
        write(np.ascontiguousarray(chunk, dtype=LENGTH_DTYPE))
    position = 0
    for chunk in _chunks(lengths):
        ends = position + np.cumsum(chunk, dtype=OFFSET_DTYPE) * dtype.itemsize
        write(ends - chunk.astype(OFFSET_DTYPE) * dtype.itemsize)
        position = int(ends[-1])
    for start in range(0, documents + 1, _CHUNK_ITEMS):
        end = min(start + _CHUNK_ITEMS, documents + 1)
        write(np.arange(start, end, dtype=OFFSET_DTYPE))


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[i : i + _CHUNK_ITEMS] for i in range(0, len(array), _CHUNK_ITEMS))
