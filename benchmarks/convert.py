"""Reshape and export a large checkpoint, compared with `cp` of the same bytes, in one run.

Random weights and moments, as tensor 2 × data 4 with ZeRO-3 writes them. Every side starts without
the files in the page cache and ends when everything is on disk. Lower bound: a conversion reads its
input twice, once to verify it, and writes the result once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaphase.checkpoint.parameters import MOMENTS, WEIGHT
from megaphase.convert.checkpoint_writer import form_for, write_checkpoint
from megaphase.convert.partition import Layout
from megaphase.convert.weight_import import foreign_state
from megaphase.data_tools.synthetic.languages import write_languages
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.model.parameters import parameter_count, parameter_layouts
from megaphase.model.presets import PRESETS
from megaphase.model.shape import GPTShape

BEFORE, AFTER = Layout(2, 4, 3), Layout(4, 2, 1)

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Measured:
    """One side: seconds until everything is on disk, and the process's largest resident memory."""

    seconds: float
    peak_bytes: int


class RandomWeights:
    """Weights and moments of an untrained model."""

    kinds = (WEIGHT, *MOMENTS)

    def __init__(self, shape: GPTShape) -> None:
        self.layouts = parameter_layouts(shape, BEFORE.tensor)

    def whole(self, name: str, kind: str) -> Tensor:
        return torch.empty(self.layouts[name].shape).normal_(0, 0.02)


def main() -> None:
    """Make a checkpoint, then copy, reshape and export it, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gpt-1.3b", choices=PRESETS)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.folder))
    try:
        _measure(_shape(arguments.preset, arguments.vocab), arguments, folder)
    finally:
        shutil.rmtree(folder)


def _shape(preset: str, vocab: int) -> GPTShape:
    sizes = PRESETS[preset]
    return GPTShape(vocab=vocab, seq_len=2048, kv_heads=sizes["heads"], **sizes)


def _measure(shape: GPTShape, arguments: argparse.Namespace, folder: Path) -> None:
    whole, weights, tokenizer = (folder / name for name in ("whole", "weights", "tok"))
    texts = write_languages(folder / "text", seed=1, languages={"alda": 100_000})
    train_tokenizer({name: [path] for name, path in texts.items()}, tokenizer, vocab_size=500)
    _write(shape, whole)
    layout = ["--tensor", AFTER.tensor, "--data", AFTER.data, "--zero", AFTER.zero]
    convert = [sys.executable, "-m", "megaphase", "convert"]
    workers = ["--workers", arguments.workers]
    only = [*convert, "reshape", whole, "--weights-only", *layout, "--out", weights]
    _run([*only, *workers], whole, None)
    out = folder / "out"
    to_hf = ["--dtype", "fp32", "--tokenizer", tokenizer, "--out", out]
    sides = {
        "reshape": (whole, [*convert, "reshape", whole, *layout, "--out", out, *workers]),
        "to-hf of weights": (weights, [*convert, "to-hf", weights, *to_hf, *workers]),
        "to-hf of everything": (whole, [*convert, "to-hf", whole, *to_hf, *workers]),
    }
    largest = 4 * max(layout.numel for layout in parameter_layouts(shape, 1).values())
    idle = _run([sys.executable, "-c", "import megaphase.convert.reshape"], weights, None)
    print(
        f"{parameter_count(shape) / 1e9:.2f} billion parameters, largest {largest / 1e6:,.0f} MB, "
        f"imports alone {idle.peak_bytes / 1e6:,.0f} MB; {arguments.rounds} rounds, best of each"
    )
    for name, (source, command) in sides.items():
        rounds = [
            (_run(["cp", "-r", source, out], source, out), _run(command, source, out))
            for _ in range(arguments.rounds)
        ]
        _show(name, source, rounds)


def _show(name: str, source: Path, rounds: Sequence[tuple[Measured, Measured]]) -> None:
    size = _bytes(source)
    cp = min(copied.seconds for copied, _ in rounds)
    megaphase = min(converted.seconds for _, converted in rounds)
    ratios = [copied.seconds / converted.seconds for copied, converted in rounds]
    peak = max(converted.peak_bytes for _, converted in rounds)
    print(
        f"{name:20} {size / 1e9:6.2f} GB  cp {size / cp / 1e9:5.2f} GB/s  megaphase "
        f"{size / megaphase / 1e9:5.2f} GB/s  ratio {cp / megaphase:.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f})  peak memory {peak / 1e6:,.0f} MB",
        flush=True,
    )


def _write(shape: GPTShape, folder: Path) -> None:
    folder.mkdir()
    weights = RandomWeights(shape)
    state = foreign_state(shape, {}) | {"optimizer_steps": 1, "precision": "bf16"}
    form = form_for(shape, BEFORE)
    write_checkpoint(folder, weights, weights.kinds, form, state, workers=2)


def _run(command: Sequence[object], source: Path, out: Path | None) -> Measured:
    """Run a command on files that are not in memory, and remove its output."""
    for path in source.rglob("*"):
        if path.is_file():
            _forget(path)
    began = time.perf_counter()
    process = subprocess.Popen([str(each) for each in command], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _peak_bytes(process.pid))
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    os.sync()
    seconds = time.perf_counter() - began
    if out is not None:
        shutil.rmtree(out)
    return Measured(seconds, peak)


def _peak_bytes(process: int) -> int:
    """Return the largest memory of a process so far, in bytes; 0 if it has ended.

    Not `ru_maxrss`, which starts from the memory of this process, from which that one was forked.
    """
    try:
        status = Path("/proc", str(process), "status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def _forget(path: Path) -> None:
    """Remove a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
