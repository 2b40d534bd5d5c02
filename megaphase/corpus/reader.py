"""Open a corpus, memory-mapped, after checks that do not read all of it.

numpy's memmap gets paths as text: of others it looks up every folder, which costs a shared file
system several requests.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megaphase.corpus.format import (
    BLOCK_DTYPE,
    HASH_DTYPE,
    SUM_DTYPE,
    Index,
    blocks_of,
    index_bytes,
    map_index,
    read_index,
)
from megaphase.corpus.manifest import (
    BLOCKS_SUFFIX,
    DATA_SUFFIXES,
    MANIFEST_SUFFIX,
    SOURCES_SUFFIX,
    TARGETS_SUFFIX,
    Manifest,
    corpus_file,
)
from megaphase.corpus.origins import StoredOrigins
from megaphase.utils.errors import InputError

_REMEDY = "tokenize again"


@dataclass(frozen=True)
class Corpus:
    """The documents of one task; all arrays are memory-mapped and read-only.

    Attributes:
        prefix: path of the files, without their suffixes.
        manifest: the corpus's properties.
        tokens: [tokens], in the .bin's dtype.
        lengths: integers [documents], in tokens, EOD included.
        byte_offsets: i64 [documents], position of each document in the .bin.
        hashes: u64 [documents], the digest of each document's text.
        blocks: u32 [blocks], checksum of each block of the .bin; None in corpora of an earlier
            version.
        targets: u8 [tokens], of chats: 1 where a token is a target of the loss; None otherwise.
    """

    prefix: Path
    manifest: Manifest
    tokens: np.ndarray
    lengths: np.ndarray
    byte_offsets: np.ndarray
    hashes: np.ndarray
    blocks: np.ndarray | None = None
    targets: np.ndarray | None = None

    @classmethod
    def open(cls, prefix: Path | str) -> Corpus:
        """Open the corpus with this prefix.

        Raises InputError if a file is missing, empty, truncated, of another version, or
        inconsistent with the others. Faults that only show when everything is read are found by
        `megaphase.corpus.integrity`.
        """
        prefix = Path(prefix)
        return cls._map(prefix, *_checked(prefix))

    @classmethod
    def of_checked(cls, prefix: Path, manifest: Manifest) -> Corpus:
        """Open a corpus that another process has just opened; only what training reads of its
        files is opened.

        manifest: the one that was found there.
        """
        size, documents = manifest.files[".idx"].bytes, manifest.documents
        if size != index_bytes(documents, documents):
            return cls.open(prefix)  # documents have several sequences, which all must be read
        arrays = map_index(corpus_file(prefix, ".idx"), documents)
        return cls._map(prefix, manifest, np.dtype(manifest.dtype), *arrays)

    @classmethod
    def _map(
        cls,
        prefix: Path,
        manifest: Manifest,
        dtype: np.dtype,
        lengths: np.ndarray,
        byte_offsets: np.ndarray,
    ) -> Corpus:
        return cls(
            prefix=prefix,
            manifest=manifest,
            tokens=np.memmap(str(corpus_file(prefix, ".bin")), dtype=dtype, mode="r"),
            lengths=lengths,
            byte_offsets=byte_offsets,
            hashes=np.memmap(str(corpus_file(prefix, ".hash")), dtype=HASH_DTYPE, mode="r"),
            blocks=_map_if_there(prefix, manifest, BLOCKS_SUFFIX, BLOCK_DTYPE),
            targets=_map_if_there(prefix, manifest, TARGETS_SUFFIX, np.dtype(np.uint8)),
        )

    @cached_property
    def sums(self) -> np.ndarray:
        """SUM_DTYPE [documents], size of each document's text and checksum of its tokens."""
        return np.memmap(str(corpus_file(self.prefix, ".sum")), dtype=SUM_DTYPE, mode="r")

    def __reduce__(self) -> tuple[object, ...]:
        # A pickled memory map would carry the whole file.
        return Corpus.open, (self.prefix,)

    @cached_property
    def origins(self) -> StoredOrigins | None:
        """The origins of the documents, or None if the corpus does not record them.

        Raises InputError if their files are missing or inconsistent with the others.
        """
        if SOURCES_SUFFIX not in self.manifest.files:
            return None
        return StoredOrigins(self.prefix, self.manifest)

    @property
    def fingerprint(self) -> str:
        """A digest that changes with any byte of the corpus."""
        return self.manifest.fingerprint

    def expect_random_reads(self) -> None:
        """Advise the operating system to read no more of the tokens than is requested.

        By default it reads 128 kB around every page that is accessed, which is right for sequential
        reading, and sixty times too much for a sample of a thousand tokens.
        """
        if isinstance(self.tokens, np.memmap):
            self.tokens._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]

    def document(self, index: int) -> np.ndarray:
        """Return the tokens [length] of one document, EOD included, as a view without verification.

        Raises IndexError if there is no such document.
        """
        return self.tokens[self._place_of(index)]

    def targets_of(self, index: int) -> np.ndarray:
        """Return which tokens of a document are targets of the loss, u8 [length]; of chats alone.

        Raises IndexError if there is no such document.
        """
        assert self.targets is not None, "only chats have marks"
        return self.targets[self._place_of(index)]

    def _place_of(self, index: int) -> slice:
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"document {index} of {len(self.lengths)}")
        start = int(self.byte_offsets[index]) // self.tokens.itemsize
        return slice(start, start + int(self.lengths[index]))


def _checked(prefix: Path) -> tuple[Manifest, np.dtype, np.ndarray, np.ndarray]:
    """Return a corpus's manifest, the dtype of its tokens, and lengths and byte offsets
    [documents]."""
    manifest = Manifest.read(prefix)
    if manifest.documents == 0 or manifest.tokens == 0:
        path = corpus_file(prefix, MANIFEST_SUFFIX)
        raise InputError(path, "the corpus is empty", "tokenize files that hold text")
    index = read_index(corpus_file(prefix, ".idx"))
    _check_sizes(prefix, manifest)
    _check_manifest_fits(prefix, manifest, index)
    lengths, byte_offsets = documents_of(prefix, index)
    _check_last_document(prefix, index.dtype, manifest, lengths, byte_offsets)
    return manifest, index.dtype, lengths, byte_offsets


def _map_if_there(
    prefix: Path, manifest: Manifest, suffix: str, dtype: np.dtype
) -> np.ndarray | None:
    if suffix not in manifest.files:
        return None
    return np.memmap(str(corpus_file(prefix, suffix)), dtype=dtype, mode="r")


def _check_sizes(prefix: Path, manifest: Manifest) -> None:
    for suffix in (*DATA_SUFFIXES, BLOCKS_SUFFIX, TARGETS_SUFFIX):
        if suffix not in manifest.files:
            continue
        path = corpus_file(prefix, suffix)
        if not path.is_file():
            raise InputError(path, "no such file", _REMEDY)
        size, expected = path.stat().st_size, manifest.files[suffix].bytes
        if size != expected:
            fault = "truncated" if size < expected else "too long"
            problem = f"is {fault}: {size} bytes, the manifest says {expected}"
            raise InputError(path, problem, _REMEDY)


def _check_manifest_fits(prefix: Path, manifest: Manifest, index: Index) -> None:
    """Raise InputError unless the manifest matches the index's header and the sizes of the
    files."""
    path = corpus_file(prefix, MANIFEST_SUFFIX)
    sizes = {suffix: manifest.files[suffix].bytes for suffix in DATA_SUFFIXES}
    documents = len(index.document_indices) - 1
    for field, stated, found, source in (
        ("dtype", manifest.dtype, index.dtype.name, ".idx"),
        ("documents", manifest.documents, documents, ".idx"),
        ("tokens", manifest.tokens, sizes[".bin"] / index.dtype.itemsize, ".bin"),
        ("documents", manifest.documents, sizes[".hash"] / HASH_DTYPE.itemsize, ".hash"),
        ("documents", manifest.documents, sizes[".sum"] / SUM_DTYPE.itemsize, ".sum"),
    ):
        if stated != found:
            found = f"{found:g}" if isinstance(found, float) else found
            problem = f"{field}: {stated}, but its {source} has {found}"
            raise InputError(path, problem, _REMEDY)
    if TARGETS_SUFFIX in manifest.files and manifest.files[TARGETS_SUFFIX].bytes != manifest.tokens:
        stated = manifest.files[TARGETS_SUFFIX].bytes
        problem = f"{TARGETS_SUFFIX}: {stated} bytes for {manifest.tokens} tokens"
        raise InputError(path, problem, _REMEDY)
    if BLOCKS_SUFFIX in manifest.files:
        stated, found = manifest.files[BLOCKS_SUFFIX].bytes, blocks_of(sizes[".bin"])
        if stated != found * BLOCK_DTYPE.itemsize:
            problem = f"{BLOCKS_SUFFIX}: {stated} bytes, but its .bin has {found} blocks"
            raise InputError(path, problem, _REMEDY)


def documents_of(prefix: Path, index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths and byte offsets [documents]; these are the index's if each is one
    sequence."""
    documents = len(index.document_indices) - 1
    if documents == len(index.lengths):
        return index.lengths, index.byte_offsets
    path = corpus_file(prefix, ".idx")
    starts = np.zeros(len(index.lengths) + 1, dtype=np.int64)
    np.cumsum(index.lengths, out=starts[1:])
    if not np.array_equal(index.byte_offsets, starts[:-1] * index.dtype.itemsize):
        raise InputError(path, "its sequences are not consecutive", _REMEDY)
    if np.any(np.diff(index.document_indices) < 0):
        raise InputError(path, "its document_indices do not ascend", _REMEDY)
    boundaries = starts[index.document_indices]
    return np.diff(boundaries), boundaries[:-1] * index.dtype.itemsize


def _check_last_document(
    prefix: Path,
    dtype: np.dtype,
    manifest: Manifest,
    lengths: np.ndarray,
    byte_offsets: np.ndarray,
) -> None:
    end = int(byte_offsets[-1]) + int(lengths[-1]) * dtype.itemsize
    size = manifest.files[".bin"].bytes
    if int(byte_offsets[0]) != 0 or end != size:
        problem = f"does not fit its .bin: its last document ends at byte {end}, the file at {size}"
        raise InputError(corpus_file(prefix, ".idx"), problem, _REMEDY)
