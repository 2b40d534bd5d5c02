"""Reshape and export a large checkpoint, compared with `cp` of the same bytes, in one run.

Random weights and moments, as tensor 2 × data 4 with ZeRO-3 writes them. Every side starts without
the files in the page cache and ends when everything is on disk; the sides take turns. The floor:
two threads that read and write the same bytes past the page cache, without looking at them.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from megaphase.checkpoint.parameters import MOMENTS, WEIGHT
from megaphase.checkpoint.tensor_file import write_tensors
from megaphase.convert.checkpoint_writer import form_for, write_checkpoint
from megaphase.convert.partition import Layout
from megaphase.convert.weight_import import foreign_state
from megaphase.data_tools.synthetic.languages import write_languages
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.model.parameters import parameter_count, parameter_layouts
from megaphase.model.presets import PRESETS
from megaphase.model.shape import GPTShape
from megaphase.utils.plot_style import plot_style

BEFORE, AFTER = Layout(2, 4, 3), Layout(4, 2, 1)

POLL_SECONDS = 0.02
SIDES = ("reshape", "to-hf of weights", "to-hf of everything")
CONVERT = (sys.executable, "-m", "megaphase", "convert")
LAYOUT = ("--tensor", AFTER.tensor, "--data", AFTER.data, "--zero", AFTER.zero)
GROWTH_SIDES = ("disk alone", "cp", "reshape", "save")
GROWTH = ((2, 128), (4, 256), (4, 512), (8, 512), (8, 1024), (16, 1024))


@dataclass(frozen=True)
class Measured:
    """One side: seconds until everything is on disk, the process's seconds on a core, and its
    largest resident memory."""

    seconds: float
    core_seconds: float
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
    parser.add_argument("--preset", default="gpt-350m", choices=PRESETS)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--growth", type=Path, metavar="PNG", help="draw seconds over sizes alone")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.folder))
    try:
        if arguments.growth is not None:
            _draw_growth(arguments, folder)
        else:
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
    workers = ["--workers", arguments.workers]
    only = [*CONVERT, "reshape", whole, "--weights-only", *LAYOUT, "--out", weights]
    _run([*only, *workers], whole, None)
    out = folder / "out"
    to_hf = ["--dtype", "fp32", "--tokenizer", tokenizer, "--out", out]
    commands = (
        (whole, [*CONVERT, "reshape", whole, *LAYOUT, "--out", out, *workers]),
        (weights, [*CONVERT, "to-hf", weights, *to_hf, *workers]),
        (whole, [*CONVERT, "to-hf", whole, *to_hf, *workers]),
    )
    largest = 4 * max(layout.numel for layout in parameter_layouts(shape, 1).values())
    idle = _run([sys.executable, "-c", "import megaphase.convert.reshape"], weights, None)
    print(
        f"{parameter_count(shape) / 1e9:.2f} billion parameters, largest {largest / 1e6:,.0f} MB, "
        f"imports alone {idle.peak_bytes / 1e6:,.0f} MB, {idle.core_seconds:.1f} core-seconds"
    )
    for name, (source, command) in zip(SIDES, commands, strict=True):
        if name in arguments.sides:
            rows = [_round(source, command, out) for _ in range(arguments.pairs)]
            _show(name, _bytes(source), rows)


def _round(source: Path, command: Sequence[object], out: Path) -> tuple[Measured, ...]:
    """Measure the floor, cp and a conversion one after the other."""
    copy = [sys.executable, Path(__file__).with_name("direct_copy.py"), source, out]
    return tuple(_run(each, source, out) for each in (copy, ["cp", "-r", source, out], command))


def _show(name: str, size: int, rows: Sequence[tuple[Measured, ...]]) -> None:
    """Print the medians of all sides, and those of the ratios with their ranges."""
    print(f"{name}, {size / 1e9:.2f} GB, {len(rows)} pairs:")
    for side, column in zip(("floor", "cp", "megaphase"), zip(*rows, strict=True), strict=True):
        speeds = [size / each.seconds / 1e9 for each in column]
        ratios = [row[1].seconds / each.seconds for row, each in zip(rows, column, strict=True)]
        core = statistics.median(each.core_seconds for each in column) / size * 1e9
        print(
            f"  {side:10} {statistics.median(speeds):5.2f} GB/s ({min(speeds):.2f} to "
            f"{max(speeds):.2f})  ratio to cp {statistics.median(ratios):5.2f} ({min(ratios):.2f} "
            f"to {max(ratios):.2f})  core-seconds/GB {core:5.2f}  peak memory "
            f"{max(each.peak_bytes for each in column) / 1e6:,.0f} MB",
            flush=True,
        )


def _draw_growth(arguments: argparse.Namespace, folder: Path) -> None:
    """Draw the seconds of cp, reshape and a save over checkpoints of growing size."""
    rows = []
    for layers, hidden in GROWTH:
        shape = GPTShape(
            vocab=8192, seq_len=2048, layers=layers, hidden=hidden, heads=8, kv_heads=8,
            ffn=4 * hidden,
        )  # fmt: skip
        source, out = folder / "source", folder / "out"
        _write(shape, source)
        command = [*CONVERT, "reshape", source, *LAYOUT, "--out", out]
        pairs = [_round(source, command, out) for _ in range(arguments.pairs)]
        medians = [
            statistics.median(each.seconds for each in column)
            for column in zip(*pairs, strict=True)
        ]
        medians.append(statistics.median(_save(shape, out) for _ in range(arguments.pairs)))
        rows.append((_bytes(source), *medians))
        print(f"{rows[-1][0] / 1e9:6.3f} GB  " + "  ".join(f"{m:6.2f} s" for m in medians))
        shutil.rmtree(source)
    sizes, *sides = zip(*rows, strict=True)
    with plot_style():
        figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
        for name, seconds in zip(GROWTH_SIDES, sides, strict=True):
            axes.plot([size / 1e9 for size in sizes], seconds, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="checkpoint, GB", ylabel="seconds")
        axes.legend(frameon=False)
        figure.savefig(arguments.growth, dpi=150)


def _save(shape: GPTShape, path: Path) -> float:
    """Return the seconds in which one rank writes its weights and moments, as a run does."""
    weights = RandomWeights(shape)
    tensors = {
        f"{kind}/{name}": weights.whole(name, kind)
        for name in weights.layouts
        for kind in weights.kinds
    }
    began = time.perf_counter()
    write_tensors(path, tensors)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


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
    used = _children_seconds()
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
    return Measured(seconds, _children_seconds() - used, peak)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
