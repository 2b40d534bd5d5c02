"""The `checkpoint` section of a run file."""

from __future__ import annotations

from megaphase.config.fields import Few, Section, Steps


class CheckpointConfig(Section):
    """The newest `keep` checkpoints stay, and the one at the end of every phase for ever.

    asynchronous: training goes on while a copy of the state is written.
    """

    every_steps: Steps = 1000
    keep: Few = 3
    asynchronous: bool = True
