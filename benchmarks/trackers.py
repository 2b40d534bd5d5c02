"""What trackers cost a training step: `python benchmarks/trackers.py`.

Rows of as many tasks as are asked for are recorded without a tracker, with W&B offline and with
MLflow in a database in a file. For each: processor time of the training thread in the callbacks of
a step, in microseconds, and of the whole process for a row, W&B's own process not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from megaphase.callbacks.callback import CallbackList, StepRecord, StepSeconds
from megaphase.callbacks.metrics_file import open_metrics
from megaphase.callbacks.trackers.feed import tracker_feed
from megaphase.callbacks.trackers.mlflow_tracker import MLflowConfig
from megaphase.callbacks.trackers.tracker import TrackerConfig
from megaphase.callbacks.trackers.wandb_tracker import WandbConfig


def record(step: int, tasks: list[str]) -> StepRecord:
    return StepRecord(
        step=step,
        phase="joint",
        phase_number=1,
        phase_step=step,
        starts=(),
        tokens=64 * step,
        samples=4,
        batch_tokens=64,
        loss=2.0,
        loss_by_task=dict.fromkeys(tasks, 2.5),
        loss_sums={},
        scored_tokens={},
        learning_rate=1e-3,
        grad_norm=0.5,
        applied=True,
        seconds=StepSeconds(0.0, 0.5, 0.0),
        tokens_per_second=128.0,
        mfu=0.4,
    )


def measure(
    trackers: dict[str, TrackerConfig], folder: Path, steps: int, tasks: list[str]
) -> tuple[float, float]:
    """Microseconds of a step on the training thread, and of a row in the whole process."""
    folder.mkdir()
    callbacks = CallbackList(print)
    metrics = folder / "metrics.jsonl"
    callbacks.extend([open_metrics(metrics, None, 1, print)])
    feeds = [tracker_feed(n, each, metrics, {}, None, print) for n, each in trackers.items()]
    callbacks.extend(feeds)
    with callbacks:
        callbacks.on_step_end(record(1, tasks))
        while any(feed.recorded_bytes == 0 for feed in feeds):
            time.sleep(0.01)  # until the packages are imported and the runs have begun
        process, own = time.process_time(), 0.0
        for step in range(2, steps + 2):
            before = time.thread_time()
            callbacks.on_step_end(record(step, tasks))
            own += time.thread_time() - before
            time.sleep(0.001)
        while any(feed.recorded_bytes < metrics.stat().st_size for feed in feeds):
            time.sleep(0.01)
        whole = time.process_time() - process
    return own / steps * 1e6, whole / steps * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=20)
    options = parser.parse_args()
    tasks = [f"task{number}" for number in range(options.tasks)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wandb = WandbConfig(project="benchmark", mode="offline")
        mlflow = MLflowConfig(experiment="x", tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
        for name, trackers in (
            ("no tracker", {}),
            ("wandb", {"wandb": wandb}),
            ("mlflow", {"mlflow": mlflow}),
        ):
            own, whole = measure(trackers, folder / name, options.steps, tasks)
            print(f"{name}: training thread {own:,.0f} µs a step, process {whole:,.0f} µs a row")


if __name__ == "__main__":
    main()
