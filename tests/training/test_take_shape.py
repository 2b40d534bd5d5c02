"""An engine that takes another shape computes what an engine built with that shape does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from distributed import once, run_ranks
from engine_support import SEQ_LEN, VOCAB, build_engine, global_batch, run_config, share

from megaphase.distributed.all_ranks import process_group
from megaphase.model.presets import build_shape
from megaphase.training.engine import Engine

LEARNING_RATE = 3e-3
# The window is longer than the first sequences and shorter than the later ones.
COMMON = {"sliding_window": 10, "attention_pattern": ["sliding", "full"]}
BEFORE = {"seq_len": SEQ_LEN // 2, **COMMON}
AFTER = {
    "seq_len": SEQ_LEN,
    "rotary_base": 100.0,
    "rotary_scaling": {"type": "linear", "factor": 2.0},
    "sliding_rotary": {"base": 50.0},
    **COMMON,
}


@dataclass(frozen=True)
class Case:
    tensor: int
    zero: int
    sequence: bool = False
    recomputed: str = "none"
    precision: str = "fp32"

    def engine(self, model: dict[str, Any]) -> Engine:
        return build_engine(self.config(model))

    def config(self, model: dict[str, Any]) -> Any:
        return run_config(
            model={**model, "activation_checkpointing": self.recomputed},
            precision=self.precision,
            tensor=self.tensor,
            zero=self.zero,
            sequence=self.sequence,
        )


CASES = [
    Case(1, 0),
    Case(1, 1, recomputed="full"),
    Case(1, 2, precision="bf16"),
    Case(1, 3, recomputed="selective"),
    Case(2, 3, sequence=True, recomputed="full"),
    Case(2, 2, precision="bf16"),
]


def compare(cases: list[Case]) -> list[list[list[float]]]:
    """Run on a rank: losses and norms of an engine that has changed, and of one built so."""
    with process_group():
        return [[_figures(case, changed) for changed in (True, False)] for case in cases]


def _figures(case: Case, changed: bool) -> list[float]:
    engine = case.engine(BEFORE if changed else AFTER)
    if changed:
        shorter = share(global_batch(9), engine.grid)
        shorter = type(shorter)(
            shorter.inputs[:, : SEQ_LEN // 2], shorter.targets[:, : SEQ_LEN // 2], shorter.tasks
        )
        engine.evaluate(shorter)
        engine.take_shape(build_shape(case.config(AFTER), VOCAB))
    found = []
    for step in range(2):
        batch = share(global_batch(step), engine.grid)
        result = engine.train_step(batch, LEARNING_RATE)
        found += [result.losses.mean, result.grad_norm]
    found.append(engine.evaluate(batch).mean)
    return found


@once
def comparisons(processes: int) -> dict[Case, list[list[float]]]:
    cases = [each for each in CASES if each.tensor * 2 == processes]
    return dict(zip(cases, run_ranks(compare, processes, cases)[0], strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_an_engine_of_that_shape_does(case: Case) -> None:
    changed, built = comparisons(case.tensor * 2)[case]
    assert changed == built
