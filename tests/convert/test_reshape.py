"""A checkpoint reshaped for another layout equals what the trainer itself writes there.

Tensor × data layouts of one, two and four processes, ZeRO 0, 1 and 3: bit for bit there and back,
and the loss curve continues to 1e-5. `make test` has one stage per layout, the slow tests all.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import astuple
from itertools import product
from pathlib import Path

import pytest
from convert_support import assert_same_shards, save
from distributed import once, run_ranks
from engine_support import build_engine, global_batch, run_config, share
from rounding import FP32

from megaphase.checkpoint.parameters import StoredParameters
from megaphase.config.run import RunConfig
from megaphase.convert.partition import Layout
from megaphase.convert.reshape import reshape
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import start_process_grid
from megaphase.training.engine import Engine

GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
LAYOUTS = [Layout(tensor, data, zero) for (tensor, data), zero in product(GRIDS, (0, 1, 3))]
QUICK = [Layout(1, 1, 0), Layout(2, 1, 1), Layout(1, 2, 3), Layout(2, 2, 3), Layout(4, 1, 1)]
EACH = [it if it in QUICK else pytest.param(it, marks=pytest.mark.slow) for it in LAYOUTS]
VOCAB = 99  # every tensor-parallel size pads its rows differently
BEFORE, AFTER = 3, 10
RATE = 1e-2


def name_of(layout: Layout) -> str:
    return "x".join(map(str, astuple(layout)))


def config_of(layout: Layout) -> RunConfig:
    return run_config(model={"kv_heads": 4}, tensor=layout.tensor, zero=layout.zero)


def train(engine: Engine, first: int, steps: int) -> list[float]:
    batches = (global_batch(first + i, vocab=VOCAB) for i in range(steps))
    return [engine.train_step(share(batch, engine.grid), RATE).losses.mean for batch in batches]


def begin(folder: str) -> list[float]:
    """Train on one process and save at `begin`; return the curve of the steps after it."""
    with process_group():
        start_process_grid(1)
        config = config_of(Layout(1, 1, 0))
        engine = build_engine(config, VOCAB)
        train(engine, 0, BEFORE)
        save(engine, config, VOCAB, Path(folder, "begin"), ControlGroup())
        return train(engine, BEFORE, AFTER)


def go_on(layouts: list[Layout], folder: str) -> dict[Layout, list[float]]:
    """Resume from `reshaped` checkpoints: save them again as `native` ones, and train."""
    with process_group():
        start_process_grid(1)
        control_group = ControlGroup()
        curves = {}
        for layout in layouts:
            config = config_of(layout)
            engine = build_engine(config, VOCAB)
            stored = StoredParameters(Path(folder, "reshaped", name_of(layout)))
            engine.state.load(stored, BEFORE)
            save(engine, config, VOCAB, Path(folder, "native", name_of(layout)), control_group)
            curves[layout] = train(engine, BEFORE, AFTER)
        return curves


@once
def trained(quick: bool) -> tuple[Path, list[float], dict[Layout, list[float]]]:
    """Return the folder, the uninterrupted curve, and the curve of every layout, or of the quick
    ones."""
    chosen = QUICK if quick else LAYOUTS
    folder = tempfile.mkdtemp(prefix="megaphase-reshape-")
    undisturbed = run_ranks(begin, 1, folder)[0]
    curves = {}
    for layout in chosen:
        source, out = Path(folder, "begin", "step-00000001"), Path(folder, "reshaped")
        reshape(str(source), out / name_of(layout), layout, weights_only=False, workers=2)
    for processes in (1, 2, 4):
        layouts = [layout for layout in chosen if layout.processes == processes]
        curves |= run_ranks(go_on, processes, layouts, folder)[0]
    return Path(folder), undisturbed, curves


@pytest.fixture(scope="module", autouse=True)
def removed_at_the_end() -> Iterator[None]:
    yield
    for quick in made:
        shutil.rmtree(trained(quick)[0])


made: set[bool] = set()


def folder_of(layout: Layout) -> Path:
    """Return the folder of its checkpoints."""
    made.add(layout in QUICK)
    return trained(layout in QUICK)[0]


def native(folder: Path, layout: Layout) -> Path:
    """Return the checkpoint that the trainer has written on a layout."""
    return folder / "native" / name_of(layout) / "step-00000001"


@pytest.mark.distributed
@pytest.mark.parametrize("layout", EACH, ids=name_of)
def test_files_are_those_that_the_trainer_writes(layout: Layout) -> None:
    folder = folder_of(layout)
    assert_same_shards(folder / "reshaped" / name_of(layout), native(folder, layout))


@pytest.mark.distributed
@pytest.mark.parametrize("source", EACH, ids=name_of)
def test_there_and_back_is_bit_equal(source: Layout, tmp_path: Path) -> None:
    folder = folder_of(source)
    for target in QUICK if source in QUICK else LAYOUTS:
        there, back = tmp_path / f"to-{name_of(target)}", tmp_path / f"from-{name_of(target)}"
        reshape(str(native(folder, source)), there, target, weights_only=False, workers=2)
        assert_same_shards(there, native(folder, target))
        reshape(str(there), back, source, weights_only=False, workers=2)
        assert_same_shards(back, native(folder, source))


@pytest.mark.distributed
@pytest.mark.parametrize("layout", EACH, ids=name_of)
def test_training_goes_on_as_if_nothing_had_happened(layout: Layout) -> None:
    _, undisturbed, curves = trained(layout in QUICK)
    assert len(curves[layout]) == AFTER
    assert curves[layout] == pytest.approx(undisturbed, rel=FP32)
