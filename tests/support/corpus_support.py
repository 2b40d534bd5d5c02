"""Corpora of translation pairs, and everything that a plan reads from its corpora."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from plan_support import TOKENIZER_HASH, as_rows, read_held_out

from megaphase.corpus import CorpusWriter, DocumentBatch
from megaphase.plan.dataset import StepReader
from megaphase.plan.plan import Plan

TAG = 59_999


def write_pairs(prefix: Path, pairs: int) -> None:
    """Write translation pairs of one length, with tokens that count up."""
    documents = np.arange(1, 1 + 20 * pairs).reshape(pairs, 20).astype(np.uint16)
    documents[:, 8] = TAG
    hashes = np.random.default_rng(3).integers(0, 2**64, pairs, dtype=np.uint64)
    with CorpusWriter(
        prefix, tokenizer_hash=TOKENIZER_HASH, vocab_size=60_000, eod=0, tag=TAG
    ) as writer:
        lengths = np.full(pairs, 20)
        writer.add_batch(DocumentBatch.of(documents.reshape(-1), lengths, hashes, lengths))


def read_everything(plan: Plan) -> list[list[tuple]]:
    """Return the rows of all steps, then the held-out rows of every task."""
    reader = StepReader(plan, 0, rank=0, ranks=1, pad_token_id=0)
    rows = [as_rows(batch) for batch in reader.steps(0, plan.phases[0].steps)]
    for number, stream in enumerate(plan.spec.held_out.values()):
        rows.append(as_rows(read_held_out(stream, number, 10**6, 0)))
    return rows
