"""Measure how long a save blocks training, compared with DeepSpeed's `save_checkpoint`, in one run.

One process, ZeRO-3. The lower bound of the blocking time is a copy of the state in memory; that of
the write is the time in which a plain writer writes the same bytes to disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megaphase.checkpoint.saver import Saver
from megaphase.checkpoint.state import full_name
from megaphase.checkpoint.store import CheckpointStore
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import start_process_grid
from megaphase.model.presets import build_shape
from megaphase.plan.dataset import Batch
from megaphase.training.engine import Engine

CHUNK = 1 << 24


def main() -> None:
    """Alternate the sides in rounds and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gpt-30m")
    parser.add_argument("--vocab", type=int, default=16000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="saving-", dir=arguments.folder))
    try:
        with process_group():
            _measure(arguments.preset, arguments.vocab, arguments.rounds, folder)
    finally:
        shutil.rmtree(folder)


def _measure(preset: str, vocab: int, rounds: int, folder: Path) -> None:
    config = _config(preset)
    shape = build_shape(config, vocab)
    engine = Engine(config, shape, start_process_grid(1), 1)
    zeros = torch.zeros((1, 16), dtype=torch.int64)
    engine.train_step(Batch(zeros, zeros, torch.zeros(1, dtype=torch.int64)), 1e-4)
    size = sum(tensor.nbytes for _, tensor in engine.state.tensors(engine.state.kinds()))
    control_group = ControlGroup()
    store = CheckpointStore(folder / "megaphase", control_group)
    saver = Saver(store, control_group, keep=1, asynchronous=True, say=lambda text: None)
    held, whole, deepspeed, copies, writes = [], [], [], [], []
    source, target = torch.ones(size // 4), torch.empty(size // 4)
    for number in range(rounds + 1):  # the first one warms up
        copies.append(_seconds(lambda: target.copy_(source)))
        writes.append(_seconds(lambda: _write_plainly(folder / "plain", source)))
        held.append(_seconds(lambda n=number: _save(saver, engine, n)))  # type: ignore[misc]
        whole.append(held[-1] + _seconds(saver.finish))
        deepspeed.append(
            _seconds(lambda: engine._engine.save_checkpoint(str(folder / "deepspeed")))
        )
    print(f"{preset}, {size / 1e9:.2f} GB of weights and optimizer state, {rounds} rounds, medians")
    sides = {
        "lower bound of the copy: same bytes in memory": copies,
        "megaphase: training blocked": held,
        "lower bound of the write: plain write + fsync": writes,
        "megaphase: until the checkpoint is published": whole,
        "DeepSpeed save_checkpoint: training blocked": deepspeed,
    }
    for name, seconds in sides.items():
        median = statistics.median(seconds[1:])
        print(f"{name:50} {median:8.3f} s  {size / median / 1e9:7.2f} GB/s")
    ratios = [b / a for a, b in zip(held[1:], deepspeed[1:], strict=True)]
    low, high = min(ratios), max(ratios)
    middle = statistics.median(ratios)
    print(f"blocked less than by DeepSpeed: {middle:.1f} times ({low:.1f} to {high:.1f})")


def _config(preset: str) -> RunConfig:
    rate = {"peak": 1e-4}
    phase = {"name": "one", "steps": 1, "mixture": {"rates": {"a": 1.0}}, "learning_rate": rate}
    return RunConfig.model_validate(
        {
            "output": "run",
            "tokenizer": "tok",
            "tasks": {"a": {"corpus": "a"}},
            "model": {"preset": preset, "seq_len": 16},
            "parallel": {"zero": 3},
            "batch": {"samples": 1},
            "phases": [phase],
        }
    )


def _save(saver: Saver, engine: Engine, number: int) -> None:
    saver.save(full_name(number), engine.state.snapshot(), {"step": number}, {})


def _write_plainly(path: Path, tensor: torch.Tensor) -> None:
    data = memoryview(tensor.numpy()).cast("B")
    with open(path, "wb", buffering=0) as file:
        for first in range(0, len(data), CHUNK):
            file.write(data[first : first + CHUNK])
        os.fsync(file.fileno())
    path.unlink()


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
