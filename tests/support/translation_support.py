"""Corpora of translation pairs, and a slow reference for packing and scoring them.

The reference shares no code with the package: it is written from docs/plan.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from plan_support import TOKENIZER_HASH, Documents, derived_key, member_key, permutation

from megaphase.corpus import CorpusWriter, DocumentBatch
from megaphase.utils.targets import IGNORED_TARGET

EOD, TAG = 0, 3
FIRST_TOKEN = 10

Piece = tuple[int, int, int]  # document, first token of it, token after the last
Lengths = tuple[int, int]  # tokens of a source and of its target


@dataclass(frozen=True)
class Pairs:
    """Documents of source, tag, target and EOD; only the last two tokens occur more than once."""

    lengths: list[Lengths]
    hashes: list[int]
    first_token: int = FIRST_TOKEN

    @property
    def documents(self) -> list[list[int]]:
        documents, token = [], self.first_token
        for source, target in self.lengths:
            words = list(range(token, token + source + target))
            documents.append([*words[:source], TAG, *words[source:], EOD])
            token += source + target
        return documents

    def on_side(self, side: str, fraction: float, subsample: float = 1.0) -> list[bool]:
        return Documents([], self.hashes, 0).on_side(side, fraction, subsample)


def random_pairs(count: int, longest: int, seed: int) -> list[Lengths]:
    """Return sources and targets of 0 to `longest` tokens."""
    lengths = np.random.default_rng(seed).integers(0, longest + 1, (count, 2))
    return [(source, target) for source, target in lengths.tolist()]


def random_hashes(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64).tolist()


def write_documents(
    prefix: Path,
    documents: list[list[int]],
    hashes: list[int],
    *,
    tag: int = TAG,
    tokenizer_hash: str = TOKENIZER_HASH,
    vocab_size: int = 60_000,
) -> None:
    """Write a corpus of pairs with these tokens as documents."""
    tokens = np.array([token for each in documents for token in each], np.uint16)
    lengths = np.array([len(each) for each in documents])
    batch = DocumentBatch.of(tokens, lengths, np.array(hashes, np.uint64), 3 * lengths)
    with CorpusWriter(
        prefix, tokenizer_hash=tokenizer_hash, vocab_size=vocab_size, eod=EOD, tag=tag
    ) as writer:
        writer.add_batch(batch)


def write_pairs(
    prefix: Path, lengths: list[Lengths], *, seed: int = 0, first_token: int = FIRST_TOKEN
) -> Pairs:
    pairs = Pairs(lengths, random_hashes(len(lengths), seed), first_token)
    write_documents(prefix, pairs.documents, pairs.hashes)
    return pairs


def packed(lengths: list[int], order: list[int], seq_len: int) -> list[list[Piece]]:
    """Return the samples of documents in this order, packed next-fit, without empty documents."""
    samples: list[list[Piece]] = []
    room = 0
    for document in order:
        length = lengths[document]
        if length <= room:
            if length:
                samples[-1].append((document, 0, length))
        elif length <= seq_len + 1:
            samples.append([(document, 0, length)])
            room = seq_len + 1
        else:
            cuts = range(0, length - 1, seq_len)
            samples += [[(document, cut, min(cut + seq_len + 1, length))] for cut in cuts]
            length -= cuts[-1]
            room = seq_len + 1
        room -= length
    return samples


def scored_from(document: list[int]) -> int:
    """Return the index of the first target of a pair: the token after the first tag."""
    return document.index(TAG) + 1 if TAG in document else len(document)


@dataclass(frozen=True)
class ExpectedRow:
    """The expected content of a sample, [seq_len] each."""

    inputs: list[int]
    targets: list[int]
    documents: list[int]


def expected_row(
    sample: list[Piece],
    documents: list[list[int]],
    seq_len: int,
    pad_token_id: int,
    scored: list[int],
) -> ExpectedRow:
    """Return a sample's row; the targets of document d are the tokens from scored[d] on."""
    tokens, targets, numbers = [], [], []
    for number, (document, first, last) in enumerate(sample):
        for place in range(first, last):
            token = documents[document][place]
            tokens.append(token)
            targets.append(token if place >= scored[document] else IGNORED_TARGET)
            numbers.append(number)
    empty = seq_len + 1 - len(tokens)
    inputs = (tokens + [pad_token_id] * empty)[:seq_len]
    numbers = (numbers + [numbers[-1]] * empty)[:seq_len]
    return ExpectedRow(inputs, targets[1:] + [IGNORED_TARGET] * empty, numbers)


@dataclass(frozen=True)
class ReferencePackedStream:
    """A translation task's samples, computed a whole epoch at a time."""

    task: str
    pairs: Pairs
    seq_len: int
    fraction: float
    seed: int = 7
    side: str = "training"
    subsample: float = 1.0

    def in_token_order(self) -> list[list[Piece]]:
        """Return the samples of every epoch, in the order in which they are packed."""
        here = self.pairs.on_side(self.side, self.fraction, self.subsample)
        lengths = [
            len(document) if on_side else 0
            for document, on_side in zip(self.pairs.documents, here, strict=True)
        ]
        family = derived_key(self.seed, "documents", self.side, self.task)
        return packed(lengths, permutation(len(lengths), member_key(family, 0)), self.seq_len)

    def epoch(self, epoch: int) -> list[list[Piece]]:
        """Return all samples of an epoch by ordinal."""
        samples = self.in_token_order()
        family = member_key(derived_key(self.seed, "samples", self.side, self.task), epoch)
        return [samples[i] for i in permutation(len(samples), member_key(family, 0))]

    def rows(self, samples: list[list[Piece]], pad_token_id: int) -> list[ExpectedRow]:
        documents = self.pairs.documents
        scored = [scored_from(document) for document in documents]
        return [
            expected_row(each, documents, self.seq_len, pad_token_id, scored) for each in samples
        ]
