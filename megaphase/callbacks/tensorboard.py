"""TensorBoard: the numbers of training steps and validations as curves, and events as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from megaphase.callbacks.callback import ValidationRecord
from megaphase.callbacks.row_recorder import RowRecorder
from megaphase.callbacks.trackers.metric_names import event_text
from megaphase.utils.errors import RunError
from megaphase.utils.files import os_errors_named
from megaphase.utils.metrics_rows import Row, read_lines

TRAINING_SCALARS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "save_seconds",
    "mfu",
)


class TensorBoard(RowRecorder):
    """Writes TensorBoard's files; every value and every event is in them once for its step.

    Where a phase begins with other weights than the one before had, or measures them with another
    sequence length, the losses of both are at the step of the switch.

    A resumed run hides what was written after its checkpoint: `purge_step` makes TensorBoard drop
    all of the checkpoint's step and of later ones from the files before, and the rows of that step
    that metrics.jsonl keeps are written again. A run that starts removes the files.
    """

    def __init__(
        self,
        folder: Path,
        resumed_step: int | None,
        metrics: Path | None = None,
        tasks: Sequence[str] = (),
    ) -> None:
        """
        Args:
            resumed_step: of the checkpoint from which the run resumes; None where it starts.
            metrics: the run's metrics.jsonl, cut to what that checkpoint has of it.
            tasks: for each of which there is a section of charts.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with os_errors_named(folder):
            before = list(folder.glob("events.out.tfevents.*"))
            if resumed_step is None:
                for path in before:
                    path.unlink()
            # Also where a run starts: TensorBoard takes the first purge for a start.
            self._writer = SummaryWriter(str(folder), purge_step=resumed_step or 0)
            if tasks:
                self._writer.add_custom_scalars({task: _charts(task) for task in tasks})
        if before and metrics is not None and resumed_step is not None:
            for row in _rows_of_step(metrics, resumed_step):
                self.write(row)

    def on_validation_end(self, record: ValidationRecord) -> None:
        """Add the losses; those that two phases share at a switch are added once."""
        if not record.repeated:
            self.write(record.row())

    def write(self, row: Row) -> None:
        """Add a row's numbers or text."""
        with os_errors_named(self._folder):
            for name, value in _scalars(row):
                if value is not None:
                    self._writer.add_scalar(name, value, row["step"])
            if "event" in row:
                self._writer.add_text(f"events/{row['event']}", event_text(row), row["step"])

    def on_save(self) -> dict[str, object]:
        with os_errors_named(self._folder):
            self._writer.flush()
        return {}

    def on_run_end(self, error: BaseException | None) -> None:
        with suppress(RunError):
            self.on_save()
        with suppress(OSError):
            self._writer.close()


def _scalars(row: Row) -> Iterator[tuple[str, float | None]]:
    """The row's numbers under the names that TensorBoard shows; None for those that it lacks, as
    rows of metrics.jsonl do where a number is not finite."""
    if "validation" in row:
        for task, figures in row["validation"].items():
            for name, value in figures.items():
                yield f"validation_{name}/{task}", value
        for task, figures in row.get("validation_average", {}).items():
            for name, value in figures.items():
                yield f"validation_average_{name}/{task}", value
    elif "benchmarks" in row:
        for key in ("benchmarks", "benchmark_groups"):
            for name, figures in row.get(key, {}).items():
                for metric, value in figures.items():
                    yield f"{key}_{metric}/{name}", value
    elif "loss_by_task" in row:  # an event may have a loss, too, which is no curve
        for task, loss in row["loss_by_task"].items():
            yield f"train_loss/{task}", loss
        for name in TRAINING_SCALARS:
            yield f"train/{name}", row[name]


def _charts(task: str) -> dict[str, list[object]]:
    """The charts of a task; its curves are given as regular expressions."""
    name = re.escape(task)
    return {
        "loss": ["Multiline", [f"^train_loss/{name}$", f"^validation(_average)?_loss/{name}$"]],
        "bits per byte": ["Multiline", [f"^validation(_average)?_bits_per_byte/{name}$"]],
        "validation loss minus training loss": ["Multiline", [f"^validation_gap/{name}$"]],
    }


def _rows_of_step(metrics: Path, step: int) -> Iterator[Row]:
    with os_errors_named(metrics):
        for line in read_lines(metrics, [b'"step": %d,' % step]):
            if line.row is not None and line.row["step"] == step:
                yield line.row
