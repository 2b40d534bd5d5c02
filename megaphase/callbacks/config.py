"""The `logging` section of a run file."""

from __future__ import annotations

from collections.abc import Iterator

from megaphase.callbacks.tracker import TrackerConfig
from megaphase.config.fields import Section, Steps


class LoggingConfig(Section):
    """How a run reports its progress."""

    every_steps: Steps = 10
    """Optimizer steps between progress lines where the output is not a terminal."""
    tensorboard: bool = True
    """Whether TensorBoard files are written beside `metrics.jsonl`."""

    def trackers(self) -> Iterator[TrackerConfig]:
        """The sections of the trackers that are asked for, in the order of their fields here."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, TrackerConfig):
                yield value
