"""The `checkpoint` section of a run file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

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
    upload_wait_seconds: Annotated[float, Field(ge=0, le=86_400)] = 300.0
    """How long the end of the run waits for uploads while no byte moves, in seconds. What is
    missing in the store then is named, and uploaded when the run is started again."""
    end_after: Steps | None = None
    """Save and end after this step, counted over the run, with exit code 0. Without this key, or
    with a later step, the same command resumes from there."""
