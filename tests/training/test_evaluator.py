"""Held-out losses where a phase has another micro-batch than the one before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plan_support import FakeTokenizer, phase, write_corpus, write_run

from megaphase.plan.dataset import Batch
from megaphase.plan.spec import plan_spec
from megaphase.training.evaluator import HeldOutEvaluator
from megaphase.training.step_result import TaskLosses

SEQ_LEN, SAMPLES = 8, 5


class NormalizingTokenizer(FakeTokenizer):
    """One whose tokens do not say how many bytes of text are behind them."""

    eod = 0
    exact_bytes = False

    def token_bytes(self) -> np.ndarray:
        return np.ones(60_000, np.int64)


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


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_text_has_the_same_bytes_with_every_micro_batch(tmp_path: Path, ranks: int) -> None:
    """The corpus has three bytes of text a token; of four rows, or eight, three are padding."""
    write_corpus(tmp_path / "en", [11] * 60, seed=1)  # whose documents have 33 bytes each
    config = write_run(tmp_path, ["en"], phases=[phase("a", 4, {"rates": {"en": 1.0}})])
    tokenizer: Any = NormalizingTokenizer()
    spec = plan_spec(config, tokenizer)
    for rank in range(ranks):
        engine: Any = FakeEngine(Grid(ranks, rank))
        evaluator = HeldOutEvaluator(spec, engine, tokenizer, SAMPLES)
        for micro in (1, 4, 1):
            engine.micro = micro
            found = evaluator.evaluate(0)["en"]
            assert found.bits_per_byte == pytest.approx(1.0)
        for targets, sizes in engine.scored:
            assert sizes == pytest.approx([3 * each for each in targets])
        share = {1: -(-SAMPLES // ranks), 4: -(-SAMPLES // (4 * ranks)) * 4}
        assert [len(sizes) for _, sizes in engine.scored] == [share[micro] for micro in (1, 4, 1)]
        own = [min(max(SAMPLES - rank * share[micro], 0), share[micro]) for micro in (1, 4, 1)]
        assert [sum(targets) for targets, _ in engine.scored] == [SEQ_LEN * n for n in own]
