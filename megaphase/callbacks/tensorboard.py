"""TensorBoard: the numbers of training steps and validations as curves over the run's steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from megaphase.callbacks.tracker import Tracker
from megaphase.utils.errors import RunError
from megaphase.utils.files import os_errors_named
from megaphase.utils.metrics_rows import Row

TRAINING_SCALARS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "save_seconds",
    "mfu",
)


class TensorBoard(Tracker):
    """Writes TensorBoard's files; every value is in them once for its step.

    A resumed run hides what was written after its checkpoint: `purge_step` makes TensorBoard drop
    values of that step and of later ones from the files before. A run that starts removes them.
    """

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        """resumed_step: of the checkpoint from which the run resumes; None where it starts."""
        from torch.utils.tensorboard import SummaryWriter

        with os_errors_named(folder):
            before = list(folder.glob("events.out.tfevents.*"))
            if resumed_step is None:
                for path in before:
                    path.unlink()
            first = 0 if resumed_step is None else resumed_step + 1
            self._writer = SummaryWriter(str(folder), purge_step=first if before else None)
        self._folder = folder
        self._validated = resumed_step if before else None

    def write(self, row: Row) -> None:
        """Add a row's numbers; those that two phases share at a switch are added once."""
        if "validation" in row:
            if row["step"] == self._validated:
                return
            self._validated = row["step"]
        with os_errors_named(self._folder):
            for name, value in _scalars(row):
                self._writer.add_scalar(name, value, row["step"])

    def on_save(self) -> dict[str, object]:
        with os_errors_named(self._folder):
            self._writer.flush()
        return {}

    def on_run_end(self, error: BaseException | None) -> None:
        with suppress(RunError):
            self.on_save()
        with suppress(OSError):
            self._writer.close()


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    """The row's numbers under the names that TensorBoard shows."""
    if "validation" in row:
        for task, figures in row["validation"].items():
            for name, value in figures.items():
                if value is not None:
                    yield f"validation_{name}/{task}", value
        for task, figures in row.get("validation_average", {}).items():
            for name, value in figures.items():
                yield f"validation_average_{name}/{task}", value
    elif "loss_by_task" in row:  # an event may have a loss, too, which is no curve
        for task, loss in row["loss_by_task"].items():
            yield f"train_loss/{task}", loss
        for name in TRAINING_SCALARS:
            if row[name] is not None:
                yield f"train/{name}", row[name]
