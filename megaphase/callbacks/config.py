"""The `logging` section of a run file."""

from __future__ import annotations

from collections.abc import Iterator

from megaphase.callbacks.trackers.mlflow_tracker import MLflowConfig
from megaphase.callbacks.trackers.tracker import TrackerConfig
from megaphase.callbacks.trackers.wandb_tracker import WandbConfig
from megaphase.config.fields import Section, Steps


class LoggingConfig(Section):
    """How a run reports its progress."""

    every_steps: Steps = 10
    """Optimizer steps between progress lines where the output is not a terminal."""
    tensorboard: bool = True
    """Whether TensorBoard files are written beside `metrics.jsonl`."""
    wandb: WandbConfig | None = None
    """Records the run at Weights & Biases."""
    mlflow: MLflowConfig | None = None
    """Records the run at MLflow."""

    def trackers(self) -> Iterator[tuple[str, TrackerConfig]]:
        """The keys and sections of the trackers that are asked for, in the order of the fields."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, TrackerConfig):
                yield name, value
