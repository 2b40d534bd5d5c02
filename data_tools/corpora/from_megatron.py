"""Convert corpora written by Megatron-LM's own builder to Megaphase's corpora."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from megaphase.corpus import CorpusWriter, Manifest
from megaphase.corpus.batch import runs_of_tokens
from megaphase.corpus.format import Index, read_index
from megaphase.corpus.manifest import corpus_file
from megaphase.data_tools.corpora.encoded import EncodedDocuments, join_documents
from megaphase.data_tools.ordered_pool import ordered_map
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.progress import reading_progress

_BATCH_TOKENS = 1 << 18
_REMEDY = "give the tokenizer that made the tokens"
_COPY_AGAIN = "copy both files again"


@dataclass(frozen=True)
class MegatronDocuments:
    """Some documents as they are stored in the `.bin`.

    Attributes:
        first: index of the first document in the corpus.
        lengths: int64 [documents], in tokens.
        tokens: [sum of lengths], one document after the other.
    """

    first: int
    lengths: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class DocumentImporter:
    """The work of one worker: check the tokens, decode the text, end every document with EOD."""

    tokenizer: Tokenizer
    path: Path

    def __call__(self, documents: MegatronDocuments) -> tuple[int, EncodedDocuments]:
        """Return the size of the documents in the `.bin`, in bytes, and the converted documents."""
        self._check_range(documents)
        tokenizer = self.tokenizer
        parts = np.split(documents.tokens, np.cumsum(documents.lengths)[:-1])
        whole = [part[:-1] if len(part) and part[-1] == tokenizer.eod else part for part in parts]
        texts = [tokenizer.decode(part).encode() for part in whole]
        return documents.tokens.nbytes, join_documents(
            whole, texts, list(map(len, texts)), tokenizer
        )

    def _check_range(self, documents: MegatronDocuments) -> None:
        tokens = documents.tokens
        wrong = (tokens < 0) | (tokens >= self.tokenizer.vocab_size)
        if wrong.any():
            at = int(np.argmax(wrong))
            ends = np.cumsum(documents.lengths)
            number = documents.first + int(np.searchsorted(ends, at, side="right"))
            largest = self.tokenizer.vocab_size - 1
            problem = f"has the token {tokens[at]}, the vocabulary ends at {largest}"
            raise InputError(self.path, f"document {number} {problem}", _REMEDY)


def corpus_from_megatron(
    source: Path,
    tokenizer_dir: Path,
    out: Path,
    *,
    workers: int,
    overwrite: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Copy the documents of Megatron-LM's `.bin` and `.idx` into the corpus with the prefix `out`.

    If the tokenizer is the one that made the tokens, the result equals that of tokenizing the
    text. Documents of several sequences become one; EOD is appended where it is missing. Memory
    grows with the number of sequences (eight bytes each), not with the tokens.

    Args:
        source: prefix of the two files.
        tokenizer_dir: the tokenizer that made the tokens.
        out: prefix of the corpus.
        workers: the maximum number of worker processes; this one reads and writes.

    Raises InputError, and leaves nothing behind, if a file is missing or damaged, a token is not
    in the vocabulary, or the corpus exists.
    """
    tokenizer = Tokenizer.load(tokenizer_dir)
    bin_path = corpus_file(source, ".bin")
    index = read_index(corpus_file(source, ".idx"))
    if not bin_path.is_file():
        raise InputError(bin_path, "no such file", "give the prefix of a .bin and .idx pair")
    lengths = _document_lengths(source, index)
    writer = CorpusWriter(
        out,
        tokenizer_hash=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        sources=[bin_path.name],
        overwrite=overwrite,
    )
    importer = DocumentImporter(tokenizer, bin_path)
    batches = ordered_map(importer, _read(lengths, bin_path, index), workers)
    size = bin_path.stat().st_size
    with writer, closing(batches), reading_progress(console, "reading", size) as advance:
        for file_bytes, encoded in batches:
            writer.add_batch(encoded.batch)
            writer.count_skipped(empty=encoded.empty)
            advance(file_bytes, encoded.batch.text_bytes)
    assert writer.manifest is not None
    return writer.manifest


def _read(documents: np.ndarray, bin_path: Path, index: Index) -> Iterator[MegatronDocuments]:
    """Yield all documents in batches; `documents` holds their lengths in tokens."""
    if bin_path.stat().st_size == 0:
        return
    tokens = np.memmap(bin_path, dtype=index.dtype, mode="r")
    begin = 0
    for first, count in runs_of_tokens(documents, _BATCH_TOKENS):
        lengths = documents[first : first + count]
        end = begin + int(lengths.sum())
        yield MegatronDocuments(first, lengths, np.array(tokens[begin:end]))
        begin = end


def _document_lengths(source: Path, index: Index) -> np.ndarray:
    """Return the length of each document in tokens, int64 [documents].

    Raises InputError unless the index is as Megatron-LM writes it: sequences that follow each
    other without a gap from the beginning to the end of the `.bin`.
    """
    path, bin_path = corpus_file(source, ".idx"), corpus_file(source, ".bin")
    starts = np.zeros(len(index.lengths) + 1, np.int64)
    np.cumsum(index.lengths, out=starts[1:])
    for wrong, fault in (
        (index.lengths < 0, "sequence {} has a negative length"),
        (
            index.byte_offsets != starts[:-1] * index.dtype.itemsize,
            "sequence {} does not begin where the one before it ends",
        ),
        (np.diff(index.document_indices) < 0, "document_indices do not ascend at document {}"),
    ):
        if wrong.any():
            raise InputError(path, f"its {fault.format(int(np.argmax(wrong)))}", _COPY_AGAIN)
    size, expected = bin_path.stat().st_size, int(starts[-1]) * index.dtype.itemsize
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        problem = f"is {fault}: {size:,} bytes, {path.name} says {expected:,}"
        raise InputError(bin_path, problem, _COPY_AGAIN)
    return np.diff(starts[index.document_indices])
