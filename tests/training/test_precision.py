"""bf16 training keeps fp32 weights: updates too small for bf16 add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from distributed import once, run_ranks
from engine_support import (
    build_engine,
    fp32_weights,
    global_batch,
    model_weights,
    run_config,
    share,
)
from torch import Tensor

from megaphase.distributed.all_ranks import process_group
from megaphase.training import engine as engine_module

STEPS = 10
# A norm's weights start at 1, where bf16 has steps of 2^-8 and 2^-7: a thousand updates and more.
LEARNING_RATE = 2e-6
NAME = "blocks.0.attention_norm.weight"
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Movement:
    """One norm's fp32 weights minus 1 after half of the steps and after all of them."""

    half: Tensor
    whole: Tensor
    model_dtype: torch.dtype
    model: Tensor


def move(runs: list[tuple[int, str]]) -> list[Movement]:
    """Run on a rank: a run for each ZeRO stage and precision."""
    with process_group():
        return [_move(zero, precision) for zero, precision in runs]


def _move(zero: int, precision: str) -> Movement:
    engine = build_engine(run_config(zero=zero, precision=precision, micro=4))
    movements = []
    for step in range(STEPS):
        engine.train_step(share(global_batch(step), engine.grid), LEARNING_RATE)
        if step + 1 in (STEPS // 2, STEPS):
            movements.append(fp32_weights(engine)[NAME] - 1)
    model = model_weights(engine)[NAME]
    return Movement(movements[0], movements[1], model.dtype, model)


@once
def movements() -> dict[tuple[int, str], Movement]:
    runs = [(0, "fp32"), *((zero, "bf16") for zero in ZERO_STAGES)]
    ranks = run_ranks(move, 2, runs)
    return dict(zip(runs, ranks[0], strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_updates_below_bf16_resolution_add_up(zero: int) -> None:
    moved, reference = movements()[zero, "bf16"], movements()[0, "fp32"]
    assert moved.whole.abs().max() > STEPS * LEARNING_RATE / 2
    assert moved.whole.abs().max() < 2**-9
    assert moved.whole.abs().mean() > 1.5 * moved.half.abs().mean()
    assert torch.cosine_similarity(moved.whole, reference.whole, dim=0) > 0.98


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_model_computes_with_bf16_weights(zero: int) -> None:
    moved = movements()[zero, "bf16"]
    assert moved.model_dtype == torch.bfloat16
    assert bool((moved.model == 1).all())


def train_immediately_or_later() -> list[list[float]]:
    """Run on a rank: losses with gradients added to the fp32 sums at once; after the pass; and at
    once by DeepSpeed's own code, which casts them first."""
    settings_of = engine_module.deepspeed_config
    found = []
    with process_group():
        for immediately, cast in ((True, False), (False, False), (True, True)):

            def settings(*given: Any, immediately: bool = immediately) -> dict[str, Any]:
                of_run: dict[str, Any] = settings_of(*given)
                assert of_run["bf16"]["immediate_grad_update"]
                of_run["bf16"]["immediate_grad_update"] = immediately
                return of_run

            engine_module.deepspeed_config = settings
            if cast:
                engine_module.sum_without_copies = lambda _: None
            engine = build_engine(run_config(zero=1, precision="bf16", micro=2))
            assert not engine._engine.tput_timer.config.enabled
            batches = map(global_batch, range(STEPS))
            found.append([engine.train_step(batch, 1e-2).losses.mean for batch in batches])
    return found


@pytest.mark.distributed
def test_adding_gradients_at_once_changes_no_loss() -> None:
    [(immediately, later, cast)] = run_ranks(train_immediately_or_later, 1)
    assert immediately == later == cast


def train_with_and_without_reduction() -> list[tuple[Tensor, list[float]]]:
    """Run on a rank: weights and losses of fp32 and bf16 without the reduction of gradients that a
    single data-parallel rank does not need, and with it."""
    found, reduce_nothing = [], engine_module.reduce_nothing
    with process_group():
        for precision in ("fp32", "bf16"):
            for reduction in (reduce_nothing, lambda _: None):
                engine_module.reduce_nothing = reduction
                engine = build_engine(run_config(zero=0, precision=precision, micro=2))
                batches = map(global_batch, range(STEPS))
                losses = [engine.train_step(batch, 1e-2).losses.mean for batch in batches]
                weights = torch.cat([each.flatten() for each in engine.module.parameters()])
                found.append((weights.detach(), losses))
    return found


@pytest.mark.distributed
def test_one_data_parallel_rank_needs_no_reduction() -> None:
    [found] = run_ranks(train_with_and_without_reduction, 1)
    for without, with_ in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(without[0], with_[0])
        assert without[1] == with_[1]
