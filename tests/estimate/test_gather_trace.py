"""What ZeRO-3 gathers in the passes of a micro-batch, compared with DeepSpeed itself."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from distributed import once, run_ranks
from engine_support import build_engine, global_batch, run_config, share

from megaphase.distributed.all_ranks import process_group
from megaphase.estimate.gather_trace import GatherLimits, gathered_in_a_micro_batch
from megaphase.estimate.gathered_parameters import (
    MESSAGE,
    REUSE_DISTANCE,
    block_bucket,
    gather_limits,
    gathering,
    kept_gathered,
    reduce_bucket,
)
from megaphase.model.parameters import parameter_sizes
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.training import engine as engine_module

PROCESSES = 2
VOCAB = 512
MODEL = {"hidden": 256, "ffn": 512, "layers": 6}
BLOCK = 3 * 256 * 256 + 3 * 512 * 256  # what of a block is not always kept
# DeepSpeed learns the order of the modules from the first passes.
LEARNING_STEPS = 3
UNLIMITED = 10**9
GPT_13B = GPTShape(
    vocab=50_304, seq_len=2048, layers=40, hidden=5120, heads=40, kv_heads=40, ffn=13696
)
SHAPES = {
    "1.3b": GPTShape(
        vocab=50_304, seq_len=2048, layers=24, hidden=2048, heads=16, kv_heads=16, ffn=5504
    ),
    "13b": GPT_13B,
    "70b": GPTShape(
        vocab=128_256, seq_len=4096, layers=80, hidden=8192, heads=64, kv_heads=8, ffn=28672
    ),
}


@dataclass(frozen=True)
class Case:
    prefetch: int
    reuse: int
    live: int = UNLIMITED
    keep_gathered: float = 0.0
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def limits(self) -> GatherLimits:
        return GatherLimits(self.prefetch, self.reuse, self.live)

    def config(self) -> Any:
        model = MODEL | self.model
        return run_config(model=model, micro=4, zero=3, keep_gathered=self.keep_gathered)


CASES = [
    Case(UNLIMITED, UNLIMITED),
    Case(0, 0),
    *(Case(0, reuse * 1_000_000) for reuse in (1, 2, 3)),
    Case(BLOCK, 1_000_000, 2_000_000),
    Case(BLOCK, 1_000_000, 3 * BLOCK),
    Case(BLOCK, 0, 3 * BLOCK),
    Case(BLOCK // 2, 1_000_000, 1_500_000),
    Case(BLOCK, 1_000_000, 2_000_000, keep_gathered=0.4),
    Case(300_000, 1_000_000, 1_500_000, model={"tied_embeddings": True}),
    Case(600_000, 700_000, 1_500_000, model={"position": "learned", "seq_len": 512}),
    Case(BLOCK, 1_000_000, 2_000_000, model={"activation_checkpointing": "full"}),
]


@dataclass(frozen=True)
class Found:
    """Elements that were gathered in each pass, and those only asked for when they were needed."""

    forward: int
    backward: int
    late: int


def record(cases: list[Case]) -> list[Found]:
    """Run on a rank."""
    with process_group():
        return [_record(case) for case in cases]


def _record(case: Case) -> Found:
    settings_of = engine_module.deepspeed_config

    def settings(*given: Any) -> dict[str, Any]:
        found: dict[str, Any] = settings_of(*given)
        found["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": case.prefetch,
            "stage3_max_reuse_distance": case.reuse,
            "stage3_max_live_parameters": case.live,
        }
        return found

    engine_module.deepspeed_config = settings
    try:
        engine = build_engine(case.config(), VOCAB)
    finally:
        engine_module.deepspeed_config = settings_of
    batch = share(global_batch(0, vocab=VOCAB), engine.grid)
    for _ in range(LEARNING_STEPS):
        engine.train_step(batch, 1e-3)
    return _gathered_by(lambda: engine.train_step(batch, 1e-3))


def _gathered_by(step: Any) -> Found:
    from deepspeed.runtime.zero import partitioned_param_coordinator as deepspeed

    coordinator = deepspeed.PartitionedParameterCoordinator
    name = "_PartitionedParameterCoordinator__all_gather_params"
    gather = getattr(coordinator, name)
    forward = backward = late = 0

    def counted(self: Any, params: Any, in_forward: bool) -> None:
        nonlocal forward, backward, late
        missing = deepspeed.ZeroParamStatus.NOT_AVAILABLE
        size = sum(each.ds_numel for each in params if each.ds_status == missing)
        forward, backward = forward + size * in_forward, backward + size * (not in_forward)
        caller = sys._getframe(1)
        while caller.f_code.co_name != "_fetch_sub_module_impl":
            assert caller.f_back is not None
            caller = caller.f_back
        late += size * (params is caller.f_locals["params_to_fetch"])
        gather(self, params, in_forward)

    setattr(coordinator, name, counted)
    try:
        step()
    finally:
        setattr(coordinator, name, gather)
    return Found(forward, backward, late)


@once
def recorded() -> list[Found]:
    first, second = run_ranks(record, PROCESSES, CASES, timeout=400)
    assert first == second
    found: list[Found] = first
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_deepspeed_gathers_what_the_trace_says(number):
    case = CASES[number]
    sizes = parameter_sizes(build_shape(case.config(), VOCAB), 1)
    kept = frozenset(kept_gathered(sizes, case.keep_gathered))
    traced = gathered_in_a_micro_batch(sizes, kept, case.limits)
    assert Found(traced.forward, traced.backward, traced.late) == recorded()[number]
    assert traced.at_loss <= traced.most_forward
    assert traced.most_backward <= max(traced.at_loss, case.live + 2 * BLOCK)


def test_weights_near_the_loss_stay_up_to_the_reuse_distance():
    sizes = parameter_sizes(build_shape(CASES[0].config(), VOCAB), 1)
    kept = frozenset(kept_gathered(sizes, 0.0))
    found = [
        gathered_in_a_micro_batch(sizes, kept, GatherLimits(0, r * 10**6, UNLIMITED))
        for r in (1, 2, 3)
    ]
    head = VOCAB * 256
    assert [each.at_loss for each in found] == [2 * head + n * BLOCK for n in (2, 3, 5)]


@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("model", SHAPES)
def test_everything_is_asked_for_ahead(model, tensor):
    sizes = parameter_sizes(SHAPES[model], tensor)
    passes = gathering(sizes, 0.0).passes
    assert passes.late == 0
    outside = sum(size for name, size in sizes.items() if not name.startswith("blocks."))
    assert passes.most_backward <= REUSE_DISTANCE + outside + 2 * block_bucket(sizes)


def test_limits_follow_the_blocks_of_a_tensor_parallel_rank():
    for tensor in (1, 8):
        sizes = parameter_sizes(GPT_13B, tensor)
        kept = kept_gathered(sizes, 0.0)
        block = sum(
            size
            for name, size in sizes.items()
            if name.startswith("blocks.0.") and name not in kept
        )
        limits = gather_limits(sizes, 0.0)
        assert (limits.prefetch, limits.reuse) == (block, REUSE_DISTANCE)
        assert reduce_bucket(sizes) >= max(block, *sizes.values())
    few = parameter_sizes(build_shape(CASES[0].config(), VOCAB), 1)
    assert block_bucket(few) <= MESSAGE < block_bucket(few) + BLOCK + 3 * 256 * 256
    every = gather_limits(few, 1.0)
    assert every.prefetch == block_bucket(few)
