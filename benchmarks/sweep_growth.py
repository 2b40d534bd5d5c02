"""Measure how much processor time a sweep takes beside its runs, over the number of its runs.

    python benchmarks/sweep_growth.py [--runs 10 100 1000] [--plot FILE]

Every run ends at once, with invented losses; writing its directory is not counted. Draws a plot.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from report_growth import arms_of, draw
from rich.console import Console

# Runs are written by the helper of the tests.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from sweep_support import sweep_of, write_run

from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.display import SweepDisplay
from megaphase.sweep.local import Machine, run_locally
from megaphase.sweep.trials import count_trials, known_trials

matplotlib.use("Agg")

JOBS = 50  # so that waiting for runs, which is no work, takes little time


class EndedRun:
    """A process that has ended well."""

    pid = 1 << 30  # of no process

    def poll(self) -> int:
        return 0

    def wait(self) -> int:
        return 0

    def send_signal(self, number: signal.Signals) -> None:
        pass


def measure(folder: Path, runs: int) -> tuple[int, float]:
    """Return the number of runs of a sweep of about so many, and its processor seconds."""
    sweep, directory = sweep_of(folder, arms_of(runs), seeds=[1, 2]), SweepDirectory(folder)
    folder.mkdir()
    directory.prepare(sweep)
    trials = {trial.name: trial for trial in known_trials(sweep, {})}
    written = 0.0

    def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> EndedRun:
        nonlocal written
        began = time.process_time()
        if log.stem not in trials:  # which depends on the best peak of a first stage
            known = known_trials(sweep, directory.outcomes())
            trials.update({trial.name: trial for trial in known})
        trial = trials[log.stem]
        write_run(directory, trial, trials.get(trial.source or ""))
        written += time.process_time() - began
        return EndedRun()

    display = SweepDisplay(Console(quiet=True), sweep, count_trials(sweep), 0)
    began = time.process_time()
    run_locally(sweep, directory, Machine(jobs=JOBS, processes=1, gpus=0), display, start)
    return len(trials), time.process_time() - began - written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runs",
        type=int,
        nargs="+",
        default=[10, 100, 300, 1_000],
        help="about so many: sweeps have whole arms",
    )
    parser.add_argument("--plot", type=Path, default=Path("sweep-growth.png"))
    options = parser.parse_args()
    found = []
    print(f"{'runs':>6} {'seconds':>8} {'ms a run':>9}")
    for runs in options.runs:
        with tempfile.TemporaryDirectory() as name:
            count, seconds = measure(Path(name) / "sweep", runs)
        print(f"{count:>6,} {seconds:>8.2f} {seconds / count * 1e3:>9.1f}")
        found.append((count, seconds / count * 1e3))

    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.2, 3.2), layout="constrained")
    draw(axes, found, "runs of a sweep", "processor time of the sweep, ms a run")
    figure.savefig(options.plot, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
