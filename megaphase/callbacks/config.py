"""The `logging` section of a run file."""

from __future__ import annotations

from megaphase.config.fields import Section, Steps


class LoggingConfig(Section):
    """How a run reports its progress."""

    every_steps: Steps = 10
    """Optimizer steps between progress lines where the output is not a terminal."""
    tensorboard: bool = True
    """Whether TensorBoard files are written beside `metrics.jsonl`."""
