"""The collectives of an optimizer step, counted where torch passes them to the network.

Collectives of a step happen once for any number of micro-batches; ZeRO-3 gathers weights as often
as `estimate.gathered_parameters` says, and otherwise a micro-batch only sends its gradients.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from distributed import once, run_ranks
from engine_support import build_engine, global_batch, run_config, share
from torch.utils._python_dispatch import TorchDispatchMode

from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.costs import FP32_BYTES
from megaphase.estimate.communication import data_traffic
from megaphase.estimate.gathered_parameters import gathering, kept_gathered
from megaphase.estimate.hardware import Hardware
from megaphase.estimate.setup import setup_of
from megaphase.model.parameters import parameter_sizes
from megaphase.model.presets import build_shape
from megaphase.training import engine as engine_module

pytestmark = pytest.mark.slow

PROCESSES = 2
VOCAB, HIDDEN, FFN, LAYERS = 512, 256, 512, 3
MODEL = {"hidden": HIDDEN, "ffn": FFN, "layers": LAYERS}
# DeepSpeed learns the order of the modules from the first passes.
LEARNING_STEPS = 3
RATE = 1e-3
FEW = 8  # elements of tensors that are neither weights nor gradients
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "allreduce_", "_allgather_base_", "_reduce_scatter_base_"
H100 = Hardware("H100", False, 1000e12, 0.5, 3000e9, 8, 450e9, 50e9)

EMBEDDING = VOCAB * HIDDEN
NORM, OUT = HIDDEN, HIDDEN * HIDDEN
LARGE = 3 * HIDDEN * HIDDEN + 2 * FFN * HIDDEN + FFN * HIDDEN  # qkv, up, down
EVERY = 2 * EMBEDDING + LAYERS * (LARGE + OUT + 2 * NORM) + NORM
SMALL = LAYERS * (OUT + 2 * NORM) + NORM  # 65,536 elements and less
# Half of the weights: the embedding and block 0; no other block fits then, but the head does.
KEPT = {0.0: SMALL, 0.5: SMALL + 2 * EMBEDDING + LARGE, 1.0: EVERY}


@dataclass(frozen=True)
class Case:
    """near: whether a weight may stay from the forward to the backward pass, as by default."""

    zero: int
    keep_gathered: float = 0.0
    near: bool = True

    @property
    def parallel(self) -> dict[str, Any]:
        return {"zero": self.zero, "keep_gathered": self.keep_gathered}


STAGES = [Case(zero) for zero in range(3)]
SHARES = [Case(3, kept) for kept in KEPT]
FAR = [Case(3, kept, near=False) for kept in KEPT]
CASES = [*STAGES, *SHARES, *FAR]
# Samples of a forward pass, of 8 on two ranks: 1 and 4 micro-batches.
MICRO = {1: 4, 4: 1}

# (collective, elements of the whole tensor), and how often.
Collectives = Counter[tuple[str, int]]


class Recorder(TorchDispatchMode):
    """Records everything that is passed to a process group."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Collectives = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            self.found[name, _elements(args)] += 1
        return function(*args, **(kwargs or {}))


def _elements(arguments: tuple[Any, ...]) -> int:
    """Return the elements of the whole tensor, found in the first two arguments."""
    tensors = [each for each in arguments[:2] if isinstance(each, torch.Tensor)]
    if isinstance(arguments[0], list):
        tensors = arguments[0]
    return max(tensor.numel() for tensor in tensors)


def record(cases: list[Case]) -> list[dict[int, list[Collectives]]]:
    """Run on a rank: by micro-batches, record the collectives of a step, and of one after
    validation."""
    with process_group():
        return [{count: _record(case, micro) for count, micro in MICRO.items()} for case in cases]


def _record(case: Case, micro: int) -> list[Collectives]:
    settings_of = engine_module.deepspeed_config
    if not case.near:
        engine_module.deepspeed_config = _far(settings_of)
    try:
        engine = build_engine(run_config(model=MODEL, micro=micro, **case.parallel), VOCAB)
    finally:
        engine_module.deepspeed_config = settings_of
    batch = share(global_batch(0, vocab=VOCAB), engine.grid)
    engine.evaluate(batch)  # as a run does before its first step
    for _ in range(LEARNING_STEPS):
        engine.train_step(batch, RATE)
    found = []
    for _ in range(2):
        with Recorder() as recorder:
            engine.train_step(batch, RATE)
        found.append(recorder.found)
        engine.evaluate(batch)
    with torch.profiler.profile() as profile:
        engine.train_step(batch, RATE)
    # The recorder sees this thread, the profiler all.
    every = [event for event in profile.events() if event.name.startswith("c10d::")]
    assert len(every) == found[-1].total()
    return found


def _far(settings_of: Any) -> Any:
    """As if the model were so large that every weight is far from its next use."""

    def settings(*given: Any) -> dict[str, Any]:
        found: dict[str, Any] = settings_of(*given)
        # Weights prefetched beyond the end of forward stay gathered as well.
        for key in ("stage3_max_reuse_distance", "stage3_prefetch_bucket_size"):
            found["zero_optimization"][key] = 0
        return found

    return settings


@once
def recorded() -> dict[Case, dict[int, list[Collectives]]]:
    first, second = run_ranks(record, PROCESSES, CASES, timeout=400)
    assert first == second
    return dict(zip(CASES, first, strict=True))


def sent(case: Case, count: int) -> Collectives:
    """Return the collectives of one optimizer step of `count` micro-batches."""
    return recorded()[case][count][0]


def of_kind(found: Collectives, kind: str) -> tuple[int, int]:
    """Return the number of collectives, and the elements of all of them."""
    mine = {size: times for (name, size), times in found.items() if name == kind}
    return sum(mine.values()), sum(size * times for size, times in mine.items())


def figures(found: Collectives) -> Collectives:
    """Return those of losses, token counts and norms: neither weights nor gradients."""
    return Counter({key: times for key, times in found.items() if key[1] <= FEW})


def test_the_sizes_of_this_file_are_those_of_the_model():
    config = run_config(model=MODEL)
    sizes = parameter_sizes(build_shape(config, VOCAB), 1)
    assert sum(sizes.values()) == EVERY
    for kept, elements in KEPT.items():
        found = gathering(sizes, kept)
        assert (found.kept, found.passes.forward) == (elements, EVERY - elements)
        assert found.passes.backward == 0
    half = kept_gathered(sizes, 0.5) - kept_gathered(sizes, 0.0)
    assert {name.split(".weight")[0] for name in half} == {
        "embedding",
        "blocks.0.attention.qkv",
        "blocks.0.feed_forward.up",
        "blocks.0.feed_forward.down",
        "head",
    }


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_goes_once_a_step_goes_once(case):
    one, four = (figures(sent(case, count)) for count in MICRO)
    assert one == four
    assert {name for name, _ in one} == {ALL_REDUCE}
    assert one.total() <= 4  # token counts, losses, the norm: one for each optimizer group


@pytest.mark.distributed
@pytest.mark.parametrize("case", STAGES[:2], ids=str)
def test_the_first_stages_send_nothing_for_a_micro_batch(case):
    assert sent(case, 4) == sent(case, 1)
    assert of_kind(sent(case, 1) - figures(sent(case, 1)), ALL_REDUCE)[1] == EVERY


@pytest.mark.distributed
def test_stage_2_sends_gradients_alone_for_a_micro_batch():
    case = Case(2)
    more = sent(case, 4) - sent(case, 1)
    assert of_kind(more, ALL_REDUCE)[1] == 3 * EVERY
    assert {name for name, _ in more} == {ALL_REDUCE}
    assert of_kind(sent(case, 4), ALL_GATHER) == of_kind(sent(case, 1), ALL_GATHER)


@pytest.mark.distributed
@pytest.mark.parametrize("count", MICRO)
@pytest.mark.parametrize("case", [*SHARES, *FAR], ids=str)
def test_stage_3_gathers_what_is_not_kept_and_scatters_gradients(case, count):
    found = sent(case, count)
    times = 1 if case.near else 2
    gathered = KEPT[case.keep_gathered] + count * times * (EVERY - KEPT[case.keep_gathered])
    assert of_kind(found, ALL_GATHER)[1] == gathered
    assert of_kind(found, REDUCE_SCATTER) == (count, count * EVERY)
    rest = {key for key in found if key[0] not in (ALL_GATHER, REDUCE_SCATTER)}
    assert rest == set(figures(found))


@pytest.mark.distributed
def test_what_is_kept_is_gathered_once_a_step():
    for case in (Case(3, 1.0), Case(3, 1.0, near=False)):
        gathers = [of_kind(sent(case, count), ALL_GATHER) for count in MICRO]
        parameters = 6 * LAYERS + 3
        assert gathers == [(parameters, EVERY)] * 2


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_after_a_validation_sends_no_more(case):
    for found, after in recorded()[case].values():
        assert not after - found


@pytest.mark.distributed
@pytest.mark.parametrize("count", MICRO)
@pytest.mark.parametrize("case", [*STAGES, *SHARES], ids=str)
def test_the_plan_estimates_what_is_really_sent(case, count):
    config = run_config(model=MODEL, micro=MICRO[count], **case.parallel)
    setup = setup_of(config, build_shape(config, VOCAB), PROCESSES, "cuda")
    traffic = data_traffic(setup, H100)
    estimated = (traffic.forward + traffic.backward) * count + traffic.end
    found = sent(case, count) - figures(sent(case, count))
    # Of two ranks each sends a half, and of an all-reduce two halves.
    halves = {ALL_REDUCE: 2, ALL_GATHER: 1, REDUCE_SCATTER: 1}
    elements = sum(halves[name] * size * times for (name, size), times in found.items()) / 2
    assert estimated.sent == pytest.approx(elements * FP32_BYTES)
