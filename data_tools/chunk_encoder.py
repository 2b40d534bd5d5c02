"""What one worker of `megaphase data tokenize` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from megaphase.corpus import DocumentBatch
from megaphase.corpus.format import HASH_DTYPE, document_hash, token_dtype
from megaphase.data_tools.text_files import (
    TextChunk,
    WrongDocument,
    documents_and_wrong_ones,
    documents_of,
)
from megaphase.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedChunk:
    """How many bytes of the file a chunk took, its documents, and those that are wrong."""

    file_bytes: int
    batch: DocumentBatch
    wrong: list[WrongDocument]


@dataclass(frozen=True)
class ChunkEncoder:
    """Tokenizes the documents of a chunk of a text file; pickles as the tokenizer's path.

    A document that is wrong raises InputError, or with `skip_wrong` is set aside.
    """

    tokenizer: Tokenizer
    json_key: str
    skip_wrong: bool = False

    def __call__(self, chunk: TextChunk) -> EncodedChunk:
        read = documents_and_wrong_ones if self.skip_wrong else documents_of
        texts, wrong = [], []
        for document in read(chunk, self.json_key):
            if isinstance(document, WrongDocument):
                wrong.append(document)
            else:
                texts.append(document)
        return EncodedChunk(chunk.file_bytes, self.encode(texts, len(wrong)), wrong)

    def encode(self, texts: Sequence[str], wrong: int = 0) -> DocumentBatch:
        """Tokenize documents; those without a token are left out."""
        encoded = [
            (tokens, text.encode())
            for text, tokens in zip(texts, self.tokenizer.encode_arrays(texts), strict=True)
            if len(tokens)
        ]
        return join_documents(encoded, self.tokenizer, empty=len(texts) - len(encoded), wrong=wrong)


def join_documents(
    documents: Sequence[tuple[np.ndarray, bytes]],
    tokenizer: Tokenizer,
    *,
    empty: int,
    wrong: int = 0,
) -> DocumentBatch:
    """A batch of documents, each its tokens [n], without EOD, and its UTF-8 text.

    empty, wrong: how many were left out, see DocumentBatch.
    """
    end = np.array([tokenizer.eod], dtype=np.int32)
    pieces = chain.from_iterable((tokens, end) for tokens, _ in documents)
    digests = b"".join(document_hash(utf8) for _, utf8 in documents)
    return DocumentBatch(
        # One empty piece more, since nothing cannot be concatenated.
        tokens=np.concatenate([end[:0], *pieces]).astype(token_dtype(tokenizer.vocab_size)),
        lengths=np.array([len(tokens) + 1 for tokens, _ in documents], dtype=np.int64),
        hashes=np.frombuffer(digests, dtype=HASH_DTYPE),
        text_bytes=sum(len(utf8) for _, utf8 in documents),
        skipped_empty=empty,
        skipped_wrong=wrong,
    )
