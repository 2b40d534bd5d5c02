"""Plot how the time of reading planned samples grows with the number of tasks.

    python benchmarks/reading_growth.py [--tasks 2 20 200] [--folder FOLDER] [--plot FILE]

All have as many tokens and documents in all, the same number in each task, and deliver as many
batches. The time is the least processor time of several rounds with all files in memory; every
round opens the plan again, so that all tokens are read for the first time, and verified.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import matplotlib
from plan_reading import BATCH, measure, prepare_tasks

matplotlib.use("Agg")

SEQ_LEN = 1024
TURNS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 6, 20, 60, 200])
    parser.add_argument("--tokens", type=float, default=2e8, help="tokens of all corpora")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="temporary folder for the corpora")
    parser.add_argument("--plot", type=Path, default=Path("reading-growth.png"))
    options = parser.parse_args()

    from matplotlib import pyplot

    found = []
    print(f"{'tasks':>6}  µs of processor time a sample")
    for tasks in options.tasks:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            tokens = [options.tokens / tasks] * tasks
            run_file = prepare_tasks(Path(name), tokens, SEQ_LEN, options.steps)
            measure("megaphase", run_file, 1)  # builds the index
            used = [measure("megaphase", run_file, 2)[1] for _ in range(TURNS)]
        found.append(min(used) / (options.steps * BATCH) * 1e6)
        print(f"{tasks:>6}  {found[-1]:.2f}", flush=True)
    figure, axes = pyplot.subplots(figsize=(4.5, 3.2), layout="constrained")
    axes.plot(options.tasks, found, marker="o")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.25 * max(found))
    axes.set_xlabel("tasks")
    axes.set_ylabel("µs of processor time a sample")
    axes.grid(alpha=0.3)
    figure.savefig(options.plot, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
