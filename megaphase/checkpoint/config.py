"""The `checkpoint` section of a run file."""

from __future__ import annotations

from megaphase.config.fields import Few, RemoteFolder, Section, Steps


class CheckpointConfig(Section):
    """When checkpoints are saved, and which of them are kept."""

    every_steps: Steps = 1000
    """Optimizer steps between checkpoints, counted over the run; besides, one is saved at the end
    of every phase."""
    keep: Few = 3
    """How many of the newest checkpoints are kept; those at the end of a phase are always kept."""
    asynchronous: bool = True
    """Whether training continues while a copy of the state is written; `false` needs no memory for
    the copy."""
    upload: RemoteFolder | None = None
    """Where checkpoints are copied in the background: the run's folder in a store, such as
    `s3://bucket/runs/first`, different for every run. `keep` holds there too."""
    end_after: Steps | None = None
    """Save and end after this step, counted over the run, with exit code 0. Without this key, or
    with a later step, the same command resumes from there."""
