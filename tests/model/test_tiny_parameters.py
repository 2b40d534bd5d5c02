"""A parameter of one element, of xIELU, which ZeRO 3 cannot share out among all ranks: it is
trained, saved and loaded on any layout."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from convert_support import save, whole_parameters
from distributed import once, run_ranks
from engine_support import VOCAB, build_engine, fp32_weights, global_batch, run_config, share
from rounding import FP32
from torch import Tensor

from megaphase.checkpoint.parameters import StoredParameters
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import start_process_grid
from megaphase.training.engine import Engine

MODEL = {"activation": "xielu"}
BEFORE, AFTER = 3, 4
NAMES = [f"blocks.{block}.feed_forward.xielu.alpha_{sign}" for block in (0, 1) for sign in "pn"]


def train(engine: Engine, first: int, steps: int) -> list[float]:
    batches = (share(global_batch(first + i), engine.grid) for i in range(steps))
    return [engine.train_step(batch, 1e-2).losses.mean for batch in batches]


def begin(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Train under ZeRO 3 and save; the weights at first and then, and the curve after that."""
    with process_group():
        start_process_grid(1)
        config = run_config(model=MODEL, tensor=1, zero=3)
        engine = build_engine(config)
        first = fp32_weights(engine)
        train(engine, 0, BEFORE)
        save(engine, config, VOCAB, Path(folder, "begin"), ControlGroup())
        return first, fp32_weights(engine), train(engine, BEFORE, AFTER)


def resume(folder: str, tensor: int, zero: int) -> list[float]:
    with process_group():
        start_process_grid(tensor)
        engine = build_engine(run_config(model=MODEL, tensor=tensor, zero=zero))
        source = Path(folder, "begin", "step-00000001")
        engine.state.load(StoredParameters(source), BEFORE)
        return train(engine, BEFORE, AFTER)


@once
def trained() -> tuple[str, dict[str, Tensor], dict[str, Tensor], list[float]]:
    folder = tempfile.mkdtemp(prefix="megaphase-tiny-")
    return folder, *run_ranks(begin, 2, folder)[0]


@pytest.mark.distributed
def test_it_is_trained_and_saved_whole() -> None:
    folder, first, weights, _ = trained()
    stored = whole_parameters(Path(folder, "begin", "step-00000001"))
    for name in NAMES:
        assert weights[name] != first[name]
        assert torch.equal(stored[name], weights[name])


@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "tensor", "zero"), [(1, 1, 0), (2, 2, 1), (2, 1, 3)])
def test_a_resumed_curve_is_the_same(processes: int, tensor: int, zero: int) -> None:
    folder, _, _, curve = trained()
    resumed = run_ranks(resume, processes, folder, tensor, zero)[0]
    assert resumed == pytest.approx(curve, rel=FP32)
