"""Held-out losses of few and many samples, and of phases with other micro-batches."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plan_support import (
    TOKENIZER_HASH,
    FakeTokenizer,
    phase,
    read_held_out,
    write_corpus,
    write_run,
)

from megaphase.config.run import RunConfig
from megaphase.corpus import CorpusWriter, DocumentBatch
from megaphase.plan.dataset import Batch
from megaphase.plan.spec import plan_spec
from megaphase.training.evaluator import BLOCK_TOKENS, HeldOutEvaluator
from megaphase.training.step_result import TaskLosses

SEQ_LEN, SAMPLES = 8, 5


class ExactTokenizer(FakeTokenizer):
    """One of whose tokens each has one byte."""

    eod = 0
    exact_bytes = True

    def token_bytes(self) -> np.ndarray:
        return np.ones(60_000, np.int64)


class NormalizingTokenizer(ExactTokenizer):
    """One whose tokens do not say how many bytes of text are behind them."""

    exact_bytes = False


@dataclass
class Grid:
    data_size: int
    data_rank: int


class FakeEngine:
    """An engine whose loss is three bits for each target, and which stores its arguments."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.micro = grid, 1
        self.scored: list[tuple[list[int], list[float]]] = []

    def evaluate(self, rows: Batch) -> TaskLosses:
        assert len(rows) % self.micro == 0
        tokens = (rows.targets >= 0).sum().double().view(1)
        return TaskLosses(3 * math.log(2) * tokens, tokens)

    def sum_by_task(self, rows: torch.Tensor, batch: Batch) -> torch.Tensor:
        self.scored.append(((batch.targets >= 0).sum(1).tolist(), rows.tolist()))
        return rows.double().sum().view(1)


def one_task(folder: Path, **changes: Any) -> RunConfig:
    phases = [phase("a", 4, {"rates": {"en": 1.0}})]
    return write_run(folder, ["en"], phases=phases, **changes)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_text_has_the_same_bytes_with_every_micro_batch(tmp_path: Path, ranks: int) -> None:
    """The corpus has three bytes of text a token; of four rows, or eight, three are padding."""
    write_corpus(tmp_path / "en", [11] * 60, seed=1)  # whose documents have 33 bytes each
    tokenizer: Any = NormalizingTokenizer()
    spec = plan_spec(one_task(tmp_path), tokenizer)
    for rank in range(ranks):
        engine: Any = FakeEngine(Grid(ranks, rank))
        evaluator = HeldOutEvaluator(spec, engine, tokenizer, SAMPLES)
        for micro in (1, 4, 1):  # the bytes of the third are known from the first
            engine.micro = micro
            found = evaluator.evaluate(0)["en"]
            assert found.bits_per_byte == pytest.approx(1.0)
        for targets, sizes in engine.scored:
            assert sizes == pytest.approx([3 * each for each in targets])
        share = {1: -(-SAMPLES // ranks), 4: -(-SAMPLES // (4 * ranks)) * 4}
        assert [len(sizes) for _, sizes in engine.scored] == [share[micro] for micro in (1, 4)]
        own = [min(max(SAMPLES - rank * share[micro], 0), share[micro]) for micro in (1, 4)]
        assert [sum(targets) for targets, _ in engine.scored] == [SEQ_LEN * n for n in own]


class SummingEngine(FakeEngine):
    """An engine whose loss is the sum of the targets, and which stores them by block."""

    def __init__(self, grid: Grid, micro: int) -> None:
        super().__init__(grid)
        self.micro = micro
        self.blocks: list[int] = []
        self.targets: list[int] = []

    def evaluate(self, rows: Batch) -> TaskLosses:
        self.blocks.append(len(rows))
        targets = rows.targets[rows.targets >= 0]
        self.targets += targets.tolist()
        return TaskLosses(targets.sum().double().view(1), super().evaluate(rows).tokens)


@pytest.mark.parametrize("tokenizer", [ExactTokenizer(), NormalizingTokenizer()])
@pytest.mark.parametrize(("ranks", "blocks"), [(1, [6] * 7), (3, [6, 6, 2]), (9, [6])])
def test_all_ranks_score_as_many_blocks_which_hold_every_sample_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Any,
    ranks: int,
    blocks: list[int],
) -> None:
    """41 samples in blocks of up to 7 rows, which are 3 micro-batches of 2; of nine ranks, one has
    5 samples and one has none."""
    monkeypatch.setattr("megaphase.training.evaluator.BLOCK_TOKENS", 7 * SEQ_LEN)
    write_corpus(tmp_path / "en", [11] * 200, seed=1)  # every token occurs once
    spec = plan_spec(one_task(tmp_path), tokenizer)
    targets = []
    for rank in range(ranks):
        engine: Any = SummingEngine(Grid(ranks, rank), micro=2)
        evaluator, reports = HeldOutEvaluator(spec, engine, tokenizer, 41), count(1)
        found = evaluator.evaluate(0, partial(next, reports))["en"]
        assert engine.blocks == blocks
        assert next(reports) == len(blocks) + 1
        nats, tokens = sum(engine.targets), max(1, len(engine.targets))
        size = tokens * (1 if tokenizer.exact_bytes else 3)
        assert found.loss == nats / tokens
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size)
        targets += engine.targets
        assert evaluator.evaluate(0)["en"] == found
    assert targets == read_held_out(spec.held_out["en"], 0, 41, 0).targets.flatten().tolist()


@pytest.mark.parametrize("tokenizer", [ExactTokenizer(), NormalizingTokenizer()])
def test_memory_does_not_grow_with_the_samples(tmp_path: Path, tokenizer: Any) -> None:
    """Eight blocks beside two, as one is read while the one before is still there."""
    seq_len, documents, trained = 2048, 8 * BLOCK_TOKENS // 1024 + 4, 3
    block = BLOCK_TOKENS // seq_len
    tokens = np.random.default_rng(3).integers(1, 60_000, (documents, 1024), np.uint16)
    with CorpusWriter(
        tmp_path / "en", tokenizer_hash=TOKENIZER_HASH, vocab_size=60_000, eod=0
    ) as writer:
        lengths = np.full(documents, 1024)
        hashes = np.arange(documents, dtype=np.uint64)  # so small that they are held out
        hashes[:trained] += 2**63
        writer.add_batch(DocumentBatch.of(tokens.reshape(-1), lengths, hashes, 3 * lengths))
    config = one_task(tmp_path, model={"preset": "gpt-3m", "seq_len": seq_len})
    spec = plan_spec(config, tokenizer)

    def peak(samples: int) -> int:
        engine: Any = FakeEngine(Grid(1, 0))
        evaluator = HeldOutEvaluator(spec, engine, tokenizer, samples)
        tracemalloc.start()
        try:
            evaluator.evaluate(0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(8 * block) < 1.2 * peak(2 * block)
