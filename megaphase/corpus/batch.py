"""Batches of tokenized documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megaphase.corpus.format import SUM_DTYPE, document_checksum
from megaphase.corpus.origins import Origins, join_origins

if TYPE_CHECKING:
    from megaphase.corpus.reader import Corpus

BATCH_TOKENS = 1 << 20


@dataclass(frozen=True)
class DocumentBatch:
    """Some tokenized documents.

    Attributes:
        tokens: [sum of lengths], the documents one after the other, each ended by EOD.
        lengths: integers [documents], in tokens, EOD included.
        hashes: u64 [documents], `document_hash` of each text.
        sums: SUM_DTYPE [documents], see `megaphase.corpus`.
        origins: where the documents come from; None if it is not known.
        targets: u8 [sum of lengths], of chats: 1 where a token is a target of the loss, else 0.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    sums: np.ndarray
    origins: Origins | None = None
    targets: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        tokens: np.ndarray,
        lengths: np.ndarray,
        hashes: np.ndarray,
        text_bytes: Sequence[int] | np.ndarray,
        origins: Origins | None = None,
        targets: np.ndarray | None = None,
    ) -> DocumentBatch:
        """Make a batch and compute the checksums of its documents.

        Args:
            tokens: in the dtype in which they are stored.
            text_bytes: size of each document's UTF-8 text.
        """
        sums = np.empty(len(lengths), SUM_DTYPE)
        sums["text_bytes"] = text_bytes
        sums["checksum"] = checksums(tokens, lengths, hashes, sums["text_bytes"])
        return cls(tokens, lengths, hashes, sums, origins, targets)

    @property
    def text_bytes(self) -> int:
        """Size of the documents' UTF-8 text in bytes."""
        return int(self.sums["text_bytes"].sum(dtype=np.int64))

    def select(self, keep: np.ndarray) -> DocumentBatch:
        """Return the documents that are marked in `keep`, bool [documents]."""
        kept = np.repeat(keep, self.lengths)
        return DocumentBatch(
            self.tokens[kept],
            self.lengths[keep],
            self.hashes[keep],
            self.sums[keep],
            None if self.origins is None else self.origins.select(keep),
            None if self.targets is None else self.targets[kept],
        )

    def reorder(self, order: np.ndarray) -> DocumentBatch:
        """Return the documents in another order, integers [documents]."""
        return DocumentBatch(
            self._by_document(self.tokens, order),
            self.lengths[order],
            self.hashes[order],
            self.sums[order],
            None if self.origins is None else self.origins.reorder(order),
            None if self.targets is None else self._by_document(self.targets, order),
        )

    def _by_document(self, values: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Return the values of all tokens with the documents in another order."""
        parts = np.split(values, np.cumsum(self.lengths)[:-1])
        return np.concatenate([values[:0], *(parts[i] for i in order)])


def checksums(
    tokens: np.ndarray, lengths: np.ndarray, hashes: np.ndarray, text_bytes: np.ndarray
) -> np.ndarray:
    """Return `document_checksum` of every document of a batch, u32 [documents]."""
    view = memoryview(np.ascontiguousarray(tokens).view(np.uint8))  # type: ignore[arg-type]
    ends = (np.cumsum(lengths, dtype=np.int64) * tokens.itemsize).tolist()
    figures = zip([0, *ends], ends, hashes.tolist(), text_bytes.tolist(), strict=False)
    sums = [document_checksum(view[begin:end], *seeds) for begin, end, *seeds in figures]
    return np.array(sums, np.uint32)


def join(batches: Sequence[DocumentBatch]) -> DocumentBatch:
    """Concatenate several batches; either all of them have origins or none has, likewise
    targets."""
    origins = [batch.origins for batch in batches if batch.origins is not None]
    tokens, lengths, hashes, sums = (
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("tokens", "lengths", "hashes", "sums")
    )
    joined = join_origins(origins) if origins else None
    targets = [batch.targets for batch in batches if batch.targets is not None]
    return DocumentBatch(
        tokens, lengths, hashes, sums, joined, np.concatenate(targets) if targets else None
    )


def batches_of(corpus: Corpus, tokens: int = BATCH_TOKENS) -> Iterator[DocumentBatch]:
    """Yield all documents of a corpus in order, about `tokens` tokens at a time, as views."""
    for first, count in runs_of_tokens(corpus.lengths, tokens):
        chosen = slice(first, first + count)
        lengths = corpus.lengths[chosen]
        begin = int(corpus.byte_offsets[first]) // corpus.tokens.itemsize
        end = begin + int(lengths.sum(dtype=np.int64))
        yield DocumentBatch(
            corpus.tokens[begin:end],
            lengths,
            corpus.hashes[chosen],
            corpus.sums[chosen],
            None if corpus.origins is None else corpus.origins.part(first, count),
            None if corpus.targets is None else corpus.targets[begin:end],
        )


def runs_of_tokens(lengths: np.ndarray, tokens: int) -> Iterator[tuple[int, int]]:
    """Split documents into runs (first, count) of at most `tokens` tokens, or of one document."""
    first, ahead = 0, 1024
    while first < len(lengths):
        ends = np.cumsum(lengths[first : first + ahead], dtype=np.int64)
        count = max(int(np.searchsorted(ends, tokens, side="right")), 1)
        if count == len(ends) and first + count < len(lengths):
            ahead *= 2  # they are shorter than expected: look further, from the same one on
            continue
        yield first, count
        first, ahead = first + count, count + count // 4 + 16
