"""Measure how reports grow: over the steps of a run, and over the runs of a sweep.

    python benchmarks/report_growth.py [--steps 10000 100000 1000000] [--runs 10 100 1000]

Writes directories of runs and sweeps as training leaves them, with invented losses, and reports on
each in another process: seconds, peak memory, and bytes of the page with its plots. Draws a plot.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

# Sweeps are written by the helper of the tests.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from sweep_support import write_sweep

matplotlib.use("Agg")

TASKS = ("en", "fr", "de", "hi", "eu")
LOW = ("hi", "eu")
SAMPLES, SEQ_LEN = 1000, 2048


def write_run(run_dir: Path, steps: int) -> None:
    """Write the directory of a run of two phases, with 100 validations."""
    switch = steps * 8 // 10
    phases = [("pretrain", 0, switch), ("joint", switch, steps - switch)]
    planned = []
    for name, first, count in phases:
        share = {
            "requested_rate": 0.2,
            "rate": 0.2,
            "samples": count * SAMPLES // 5,
            "tokens": count * SAMPLES // 5 * SEQ_LEN,
            "epochs": 0.5,
            "epochs_so_far": 0.5,
        }
        planned.append(
            {
                "name": name,
                "steps": count,
                "first_step": first,
                "samples": count * SAMPLES,
                "tokens": count * SAMPLES * SEQ_LEN,
                "tasks": dict.fromkeys(TASKS, share),
            }
        )
    corpus = {
        "documents": 10**6,
        "tokens": 10**9,
        "held_out_documents": 10**4,
        "text_bytes": 4 * 10**9,
    }
    plan = {
        "seq_len": SEQ_LEN,
        "samples_per_step": SAMPLES,
        "tasks": dict.fromkeys(TASKS, corpus),
        "phases": planned,
    }
    run_dir.mkdir(parents=True)
    settings = {"seed": 1234, "model": {"preset": "gpt-8b"}, "tokenizer": "tok"}
    (run_dir / "run.json").write_text(json.dumps(settings))
    (run_dir / "plan.json").write_text(json.dumps(plan))
    with open(run_dir / "metrics.jsonl", "w", encoding="utf-8") as file:
        for name, first, count in phases:
            file.write(json.dumps({"step": first, "event": "phase_start", "phase": name}) + "\n")
            for step in range(first, first + count + 1):
                if step > first:
                    file.write(json.dumps(training_row(step, name, first, steps)) + "\n")
                if step % (steps // 100) == 0:
                    losses = {
                        task: {"loss": loss(step / steps), "bits_per_byte": 1.0} for task in TASKS
                    }
                    row = {"step": step, "phase": name, "validation": losses}
                    file.write(json.dumps(row) + "\n")


def loss(fraction: float) -> float:
    """Return a loss that falls over a run."""
    return 3 + 5 * math.exp(-10 * fraction)


def training_row(step: int, phase: str, first: int, steps: int) -> dict[str, object]:
    """Return a row of metrics.jsonl with all that training writes on a GPU."""
    noisy = loss(step / steps) + (step * 7919 % 1000) / 5000
    return {
        "step": step,
        "phase": phase,
        "phase_step": step - first,
        "tokens": step * SAMPLES * SEQ_LEN,
        "samples": SAMPLES,
        "loss": noisy,
        "loss_by_task": dict.fromkeys(TASKS, noisy),
        "learning_rate": 3e-4,
        "grad_norm": 1.0,
        "step_seconds": 5.0,
        "data_wait_seconds": 0.01,
        "save_seconds": 0.0,
        "tokens_per_second": 4e5,
        "mfu": 0.4,
    }


def report(folder: Path, out: Path) -> tuple[float, float, int]:
    """Report in another process; return seconds, peak memory in MB and bytes of the page."""
    command = [sys.executable, "-m", "megaphase", "report", str(folder), "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    memory = used.ru_maxrss / 1e3
    return seconds, memory, (out / "index.html").stat().st_size


def arms_of(runs: int) -> dict[str, dict[str, list[float]]]:
    """Return the arms of a sweep of about so many runs, with two peaks and two seeds."""
    count = max(1, (runs - 4) // 8)
    rates = [round(0.01 + 0.9 * i / count, 4) for i in range(count)]
    return {"static": {"rates": rates}, "two-phase": {"rates": rates, "pretrain": [0.8]}}


def write_sweep_of(folder: Path, runs: int) -> int:
    """Write the directory of a finished sweep of about so many runs; return their number."""
    write_sweep(folder, arms_of(runs), seeds=[1, 2], test=True)
    return sum(1 for _ in (folder / "runs").iterdir())


def draw(axes: Axes, points: list[tuple[int, float]], size: str, cost: str) -> None:
    """Draw a cost over a size, both on logarithmic axes with equal decades: work that is in
    proportion to the size is a line of 45 degrees."""
    axes.plot(*zip(*points, strict=True), marker="o")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(size)
    axes.set_ylabel(cost)
    axes.grid(alpha=0.3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--runs",
        type=int,
        nargs="+",
        default=[10, 100, 1_000],
        help="about so many: sweeps have whole arms",
    )
    parser.add_argument("--folder", type=Path, help="temporary folder")
    parser.add_argument("--plot", type=Path, default=Path("report-growth.png"))
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[int, float]]] = {"steps of a run": [], "runs of a sweep": []}
    print(f"{'':>16} {'':>10} {'seconds':>8} {'MB':>6} {'page, MB':>9}")
    for what, sizes in (("steps of a run", options.steps), ("runs of a sweep", options.runs)):
        for size in sizes:
            with tempfile.TemporaryDirectory(dir=options.folder) as name:
                written = Path(name) / "written"
                if what == "steps of a run":
                    write_run(written, size)
                else:
                    size = write_sweep_of(written, size)
                seconds, memory, page = report(written, Path(name) / "report")
            print(f"{what:>16} {size:>10,} {seconds:>8.1f} {memory:>6.0f} {page / 1e6:>9.2f}")
            found[what].append((size, seconds))

    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, 2, figsize=(7.6, 3.2), layout="constrained")
    for axes, (what, points) in zip(all_axes, found.items(), strict=True):
        draw(axes, points, what, "seconds of megaphase report")
    figure.savefig(options.plot, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
