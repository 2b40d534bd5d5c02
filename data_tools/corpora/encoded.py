"""Tokenized documents in the form in which a corpus stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from megaphase.chats.encoder import EncodedChat
from megaphase.corpus import DocumentBatch
from megaphase.corpus.format import HASH_DTYPE, document_hash, token_dtype
from megaphase.corpus.origins import UNKNOWN_SOURCE, Origins
from megaphase.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents to be stored in a corpus, and the number of documents dropped as empty."""

    batch: DocumentBatch
    empty: int


def join_documents(
    tokens: Sequence[np.ndarray],
    hashed: Sequence[bytes],
    text_bytes: Sequence[int],
    tokenizer: Tokenizer,
    ids: Sequence[bytes] | None = None,
    source: int = UNKNOWN_SOURCE,
) -> EncodedDocuments:
    """Join the documents that have tokens, each followed by EOD.

    Args:
        tokens: [tokens of the document] for each document, without EOD.
        hashed: for each document, the part of its text from which its hash is computed.
        text_bytes: for each document, the size of its text in bytes of UTF-8.
        ids: for each document, its own id, empty if it has none; None: do not store origins.
        source: the number of the file that contained the documents.
    """
    counts = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
    kept = np.flatnonzero(counts)
    end = np.array([tokenizer.eod], dtype=np.int32).tobytes()
    parts = ((_as_int32(tokens[i]).data, end) for i in kept.tolist())
    joined = b"".join(chain.from_iterable(parts))
    stored = np.frombuffer(joined, np.int32).astype(token_dtype(tokenizer.vocab_size))
    digests = b"".join([document_hash(hashed[i]) for i in kept.tolist()])
    sizes = np.asarray(text_bytes, dtype=np.int64)[kept]
    origins = None if ids is None else Origins.of([ids[i] for i in kept.tolist()], source)
    hashes = np.frombuffer(digests, HASH_DTYPE)
    batch = DocumentBatch.of(stored, counts[kept] + 1, hashes, sizes, origins)
    return EncodedDocuments(batch, len(tokens) - len(kept))


def join_chats(
    chats: Sequence[EncodedChat], tokenizer: Tokenizer, ids: Sequence[bytes], source: int
) -> EncodedDocuments:
    """Join conversations; arguments as above."""
    tokens = [chat.tokens for chat in chats]
    dtype = token_dtype(tokenizer.vocab_size)
    batch = DocumentBatch.of(
        np.concatenate([np.empty(0, np.int32), *tokens]).astype(dtype),
        np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens)),
        np.frombuffer(b"".join(document_hash(chat.prompt) for chat in chats), HASH_DTYPE),
        [chat.text_bytes for chat in chats],
        Origins.of(list(ids), source),
        np.concatenate([np.empty(0, np.uint8), *(chat.targets for chat in chats)]),
    )
    return EncodedDocuments(batch, 0)


def _as_int32(tokens: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tokens, dtype=np.int32)
