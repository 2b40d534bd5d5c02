"""Plot how the time of building a plan grows, with its samples, tasks and documents.

    python benchmarks/plan_growth.py [--folder FOLDER] [--plot FILE]

Each series varies one of them over two decades and more, the others being fixed; the time is the
least processor time of several builds, with all threads, divided by what it should be in proportion
to: samples, or documents. A line that is not flat grows faster or slower than the work.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from synthetic_corpora import document_lengths, open_spec, write_corpus, write_run_file

from megaphase.plan.build import ensure_built

matplotlib.use("Agg")

SEQ_LEN = 2048
MEAN_DOCUMENT = 1000
BATCH = 1000
TURNS = 3


@dataclass(frozen=True)
class Size:
    """A plan: tasks with as many documents each, and two phases of as many samples in all."""

    samples: int
    tasks: int
    documents: int  # of all tasks


SERIES: dict[str, tuple[Sequence[Size], Callable[[Size], int], str]] = {
    "samples": (
        [Size(n, 20, 200_000) for n in (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)],
        lambda size: size.samples,
        "ns a sample",
    ),
    "tasks": (
        [Size(4_000_000, n, 4_000_000) for n in (2, 10, 30, 100, 300, 1_000)],
        lambda size: size.samples,
        "ns a sample",
    ),
    "documents": (
        [Size(n // 2, 2, n) for n in (100_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)],
        lambda size: size.documents,
        "ns a document",
    ),
}


def build_seconds(folder: Path, size: Size) -> tuple[float, float]:
    """Return the least processor and wall-clock seconds of a build of this plan."""
    names = [f"task{number:04}" for number in range(size.tasks)]
    for seed, name in enumerate(names):
        lengths = document_lengths(size.documents // size.tasks, MEAN_DOCUMENT, seed)
        write_corpus(folder / name, lengths, seed, with_tokens=False)
    steps = size.samples // BATCH
    phases = [
        {"name": "pretrain", "steps": steps // 2, "mixture": {"proportional": True}},
        {"name": "joint", "steps": steps - steps // 2, "mixture": {"temperature": 3.3}},
    ]
    config, spec = open_spec(
        write_run_file(folder, names, seq_len=SEQ_LEN, batch=BATCH, phases=phases)
    )
    found = []
    for _ in range(TURNS):
        shutil.rmtree(config.output, ignore_errors=True)
        began, used = time.perf_counter(), time.process_time()
        ensure_built(spec, config.output)
        found.append((time.process_time() - used, time.perf_counter() - began))
    return min(cpu for cpu, _ in found), min(wall for _, wall in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="temporary folder for corpora and plans")
    parser.add_argument("--plot", type=Path, default=Path("plan-growth.png"))
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)

    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for axes, (what, (sizes, amount, unit)) in zip(all_axes, SERIES.items(), strict=True):
        print(f"{what:>12} {'cpu s':>8} {'wall s':>8}  {unit}")
        values = []
        for size in sizes:
            with tempfile.TemporaryDirectory(dir=options.folder) as name:
                cpu, wall = build_seconds(Path(name), size)
            values.append(cpu / amount(size) * 1e9)
            print(f"{getattr(size, what):>12,} {cpu:>8.2f} {wall:>8.2f}  {values[-1]:.1f}")
        axes.plot([getattr(size, what) for size in sizes], values, marker="o")
        axes.set_xscale("log")
        axes.set_ylim(0, 1.25 * max(values))
        axes.set_xlabel(what)
        axes.set_ylabel(f"processor time, {unit}")
        axes.grid(alpha=0.3)
    figure.savefig(options.plot, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
