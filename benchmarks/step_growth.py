"""Measure how a training step grows: over layers, over seq_len and over processes.

    python benchmarks/step_growth.py [--steps 5] [--plot FILE]

The model of a preset, fp32, on the CPU. Over seq_len a step has the same number of tokens. Over
processes, which share the threads, each has the same number of samples: a step of eight has eight
times the work of one, so its time should be four times that of two where there are two threads.
Draws a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from pathlib import Path

import matplotlib
from throughput_sides import MegaphaseEngine, Settings, Side

matplotlib.use("Agg")

WARM_UP_STEPS = 2
BASE = Settings(
    preset="gpt-1m",
    vocab=4_000,
    seq_len=256,
    batch=8,
    micro=8,
    kv_heads=None,
    threads=os.cpu_count() or 1,
    precision="fp32",
    device="cpu",
    checkpointing="none",
)
LAYERS = (2, 4, 8, 16, 32, 64)
LENGTHS = (64, 128, 256, 512, 1_024, 2_048)
PROCESSES = (1, 2, 4, 8)


def seconds_of(kind: MegaphaseEngine, settings: Settings, steps: int) -> float:
    """Return the median time of a step."""
    side = Side(kind, settings)
    try:
        side.take_steps(WARM_UP_STEPS)
        return statistics.median(side.take_steps(steps))
    finally:
        side.stop()


def growths(steps: int) -> dict[str, list[tuple[int, float]]]:
    """Return for every line its points: the size and milliseconds of a step."""
    found: dict[str, list[tuple[int, float]]] = {}

    def measure(line: str, size: int, kind: MegaphaseEngine, settings: Settings) -> None:
        milliseconds = 1e3 * seconds_of(kind, settings, steps)
        print(f"{line:>24} {size:>6,} {milliseconds:>9.1f} ms a step", flush=True)
        found.setdefault(line, []).append((size, milliseconds))

    one = MegaphaseEngine(zero=0, kernels="eager")
    for layers in LAYERS:
        measure("layers", layers, one, dataclasses.replace(BASE, layers=layers))
    tokens = BASE.tokens_per_step
    for length in LENGTHS:
        batch = tokens // length
        settings = dataclasses.replace(BASE, seq_len=length, batch=batch, micro=batch)
        measure("seq_len", length, one, settings)
    for zero in (0, 3):
        for processes in PROCESSES:
            kind = MegaphaseEngine(zero=zero, kernels="eager", data=processes)
            settings = dataclasses.replace(BASE, batch=BASE.batch * processes)
            measure(f"processes, ZeRO {zero}", processes, kind, settings)
    return found


def draw(found: dict[str, list[tuple[int, float]]], path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, panels = pyplot.subplots(1, 3, figsize=(9.6, 3.2), layout="constrained")
    for axes, what in zip(panels, ("layers", "seq_len", "processes"), strict=True):
        drawn = {line: points for line, points in found.items() if line.startswith(what)}
        times = [milliseconds for points in drawn.values() for _, milliseconds in points]
        axes.set_ylim(min(times) / 2, max(times) * 2)
        for line, points in drawn.items():
            label = line.partition(", ")[2]
            axes.plot(*zip(*points, strict=True), marker="o", label=label or None)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel(what)
        axes.set_ylabel("ms a step")
        axes.grid(alpha=0.3)
        if what == "processes":
            axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="counted steps of every size")
    parser.add_argument("--plot", type=Path, default=Path("step-growth.png"))
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps: at least 1")
    draw(growths(options.steps), options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
