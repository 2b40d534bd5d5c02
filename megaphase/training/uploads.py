"""Whether and where a run's checkpoints are uploaded."""

from __future__ import annotations

from collections.abc import Callable

from megaphase.checkpoint.upload import Uploader
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import on_first_rank
from megaphase.distributed.dist_env import global_rank
from megaphase.plan.spec import PlanSpec
from megaphase.training.run_directory import RunDirectory


def claimed_uploader(
    config: RunConfig, spec: PlanSpec, say: Callable[[str], None]
) -> Uploader | None:
    """Return the run's uploader, on rank 0, if its run file has `checkpoint.upload`; called by all
    ranks.

    Raises:
        InputError: on all ranks; the store cannot be used, or another run has the folder in it.
    """
    settings = config.checkpoint
    if settings.upload is None:
        return None
    uploader = Uploader(
        RunDirectory(config.output).checkpoints,
        settings.upload,
        key=config.where("checkpoint.upload"),
        plan=spec.fingerprint,
        keep=settings.keep,
        wait_seconds=settings.upload_wait_seconds,
        say=say,
    )
    on_first_rank(uploader.claim)
    return uploader if global_rank() == 0 else None
