"""Write a corpus so that it appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from megaphase.corpus.format import (
    HASH_DTYPE,
    LENGTH_DTYPE,
    document_hash,
    token_dtype,
    write_index,
)
from megaphase.corpus.hashed_file import HashedFile
from megaphase.corpus.manifest import DATA_SUFFIXES, MANIFEST_SUFFIX, Manifest, corpus_file
from megaphase.errors import InputError, RunError
from megaphase.files import fsync_path, make_directory


@dataclass(frozen=True)
class DocumentBatch:
    """Some tokenized documents.

    Attributes:
        tokens: [sum of lengths], the documents one after the other, each ended by EOD.
        lengths: integers [documents], in tokens, EOD included.
        hashes: u64 [documents], `document_hash` of each text.
        text_bytes: bytes of the documents' UTF-8 text.
        skipped_empty: texts left out because they have no token.
        skipped_wrong: what was left out because it could not be read.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    text_bytes: int
    skipped_empty: int = 0
    skipped_wrong: int = 0


class CorpusWriter:
    """Context manager that writes `PREFIX.bin`, `.idx`, `.hash` and, as commit point, `.json`.

    Everything is written aside, hashed on the way, and renamed when the block ends; where the
    block raises, nothing is left. Memory does not grow with the number of documents.

    Raises InputError where files of the prefix exist and `overwrite` is not set, where they cannot
    be created, and, at the end, where no document was added; RunError where the disk is full.

    Attributes:
        dtype: in which tokens are stored: u16 for a vocabulary below 65,500, else i32.
        manifest: what was written; known once the block has ended.
    """

    def __init__(
        self,
        prefix: Path | str,
        *,
        tokenizer_hash: str,
        vocab_size: int,
        eod: int,
        sources: Sequence[str] = (),
        tag: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """
        Args:
            tag: of translation pairs, the token between source and target.
        """
        self.prefix = Path(prefix)
        self.dtype = token_dtype(vocab_size)
        self.manifest: Manifest | None = None
        self._tokenizer_hash = tokenizer_hash
        self._vocab_size = vocab_size
        self._eod = eod
        self._sources = list(sources)
        self._tag = tag
        self._documents = self._tokens = self._text_bytes = 0
        self._skipped_empty = self._skipped_wrong = 0
        if not overwrite:
            refuse_existing(self.prefix)

    def __enter__(self) -> CorpusWriter:
        make_directory(self.prefix.parent)
        with ExitStack() as opened:
            try:
                # Nameless, so that not even a killed process leaves it behind.
                self._lengths = opened.enter_context(tempfile.TemporaryFile(dir=self.prefix.parent))
                self._files: dict[str, HashedFile] = {}
                for suffix in DATA_SUFFIXES:
                    self._files[suffix] = HashedFile(corpus_file(self.prefix, suffix))
                    opened.callback(self._files[suffix].discard)
            except OSError as error:
                problem = f"cannot be written ({error.strerror})"
                raise InputError(self.prefix, problem, "choose another --out") from None
            self._opened = opened.pop_all()
        return self

    def add_document(self, tokens: Sequence[int] | np.ndarray, text: str) -> None:
        """Add one document: its tokens [n], without EOD, and its text."""
        utf8 = text.encode()
        stored = np.empty(len(tokens) + 1, dtype=self.dtype)
        stored[:-1] = tokens
        stored[-1] = self._eod
        hashes = np.frombuffer(document_hash(utf8), dtype=HASH_DTYPE)
        self.add_batch(DocumentBatch(stored, np.array([len(stored)]), hashes, len(utf8)))

    def add_batch(self, batch: DocumentBatch) -> None:
        """Add documents whose tokens are joined already, EODs included."""
        if not len(batch.lengths) == len(batch.hashes):
            raise ValueError(f"{len(batch.lengths)} lengths, {len(batch.hashes)} hashes")
        if int(batch.lengths.sum(dtype=np.int64)) != len(batch.tokens):
            raise ValueError(f"lengths do not sum to the {len(batch.tokens)} tokens")
        with self._write_errors():
            self._files[".bin"].write(batch.tokens.astype(self.dtype, copy=False))
            self._files[".hash"].write(batch.hashes.astype(HASH_DTYPE, copy=False))
            self._lengths.write(batch.lengths.astype(LENGTH_DTYPE).tobytes())
        self._documents += len(batch.lengths)
        self._skipped_empty += batch.skipped_empty
        self._skipped_wrong += batch.skipped_wrong
        self._tokens += len(batch.tokens)
        self._text_bytes += batch.text_bytes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._opened:
            if kind is None:
                with self._write_errors():
                    self._commit()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"{self.prefix}: cannot be written ({error.strerror})") from None

    def _commit(self) -> None:
        if self._documents == 0:
            raise InputError(self.prefix, "the corpus would be empty", "give files that hold text")
        self._lengths.flush()
        lengths = np.memmap(self._lengths, dtype=LENGTH_DTYPE, mode="r")  # type: ignore[call-overload]
        write_index(self._files[".idx"].write, self.dtype, lengths)
        manifest = Manifest(
            tokenizer_hash=self._tokenizer_hash,
            vocab_size=self._vocab_size,
            eod=self._eod,
            dtype=self.dtype.name,
            documents=self._documents,
            skipped_empty=self._skipped_empty,
            skipped_wrong=self._skipped_wrong,
            tokens=self._tokens,
            text_bytes=self._text_bytes,
            files={suffix: self._files[suffix].finish() for suffix in DATA_SUFFIXES},
            sources=self._sources,
            kind="lm" if self._tag is None else "translation",
            tag=self._tag,
        )
        # An old manifest must not stand beside new data, not even for a moment.
        corpus_file(self.prefix, MANIFEST_SUFFIX).unlink(missing_ok=True)
        fsync_path(self.prefix.parent)
        try:
            for file in self._files.values():
                file.publish()
            fsync_path(self.prefix.parent)
            manifest.write(self.prefix)
        except BaseException:
            for suffix in DATA_SUFFIXES:
                corpus_file(self.prefix, suffix).unlink(missing_ok=True)
            raise
        self.manifest = manifest


def refuse_existing(prefix: Path) -> None:
    """Raise InputError where a file of the corpus exists, even one that is not whole."""
    for suffix in (MANIFEST_SUFFIX, *DATA_SUFFIXES):
        path = corpus_file(prefix, suffix)
        if os.path.lexists(path):
            raise InputError(path, "exists already", "pass --overwrite or choose another --out")
