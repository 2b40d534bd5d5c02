"""The `logging` section of a run file."""

from __future__ import annotations

from megaphase.config.fields import Section, Steps


class LoggingConfig(Section):
    """every_steps: how often a plain progress line is printed when no terminal is there."""

    every_steps: Steps = 10
    tensorboard: bool = True
