"""With sequence parallelism, no whole activation of a block is copied for a collective."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from distributed import once, run_ranks
from engine_support import MODEL, SEQ_LEN, build_engine, global_batch, run_config
from torch.utils._python_dispatch import TorchDispatchMode

from megaphase.distributed.all_ranks import process_group
from megaphase.ops.row_order import is_sequence_first, sequence_first, stored_order

PROCESSES, MICRO, LAYERS, MORE_LAYERS = 2, 4, 2, 4
COPIES = {"aten::clone", "aten::copy_", "aten::cat"}
COLLECTIVES = {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_"}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "selective": {"activation_checkpointing": "selective"},
    "full": {"activation_checkpointing": "full"},
    "gpt2": {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True},
    "grouped": {"kv_heads": 2},
}
HIDDEN = MODEL["hidden"]
ROWS = MICRO // 2 * SEQ_LEN  # of half of a micro-batch


class Recorder(TorchDispatchMode):
    """Counts operations on tensors that have the size of the activations of a half."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in (result, *args) if isinstance(x, torch.Tensor) and x.dim()]
        if any(x.shape[-1] == HIDDEN and x.numel() == ROWS * HIDDEN for x in tensors):
            self.found[function._schema.name] += 1
        return result


def count() -> dict[str, Counter[str]]:
    """Run on a rank: the operations that a micro-batch has for more layers, by variant."""
    with process_group():
        return {
            name: _count(model, MORE_LAYERS) - _count(model, LAYERS)
            for name, model in VARIANTS.items()
        }


def _count(model: dict[str, Any], layers: int) -> Counter[str]:
    model = model | {"layers": layers, "ffn": 80}
    settings = run_config(model=model, micro=MICRO, tensor=PROCESSES, sequence=True, zero=0)
    engine = build_engine(settings)
    [micro, _] = global_batch(0).split(MICRO)
    with Recorder() as recorder:
        engine._engine.backward(engine._forward(micro, None)[0])
    return recorder.found


@once
def counted() -> dict[str, Counter[str]]:
    first, second = run_ranks(count, PROCESSES)
    assert first == second
    found: dict[str, Counter[str]] = first
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_copies_no_whole_activation(variant):
    found = counted()[variant]
    assert found.keys() >= COLLECTIVES
    assert not found.keys() & COPIES


def test_the_order_of_rows_is_recognized():
    x = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    assert not is_sequence_first(x)
    assert stored_order(x)(x) is x
    other = sequence_first(x)
    assert torch.equal(other, x)
    assert is_sequence_first(other)
    assert sequence_first(other).data_ptr() == other.data_ptr()
    order = stored_order(other)
    assert order(other).is_contiguous()
    assert torch.equal(order(order(other)), x)
    assert not is_sequence_first(x[:, :, :2])  # stored with gaps
    assert not is_sequence_first(sequence_first(x)[..., :2])
