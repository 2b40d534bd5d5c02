"""Determine from a run's lock, metrics and job whether it is being trained now."""

from __future__ import annotations

from pathlib import Path

from megaphase.launch.slurm.job_file import OVER
from megaphase.utils.files import real_path
from megaphase.utils.locks import is_locked
from megaphase.utils.run_files import LOCK_FILE

# For a run whose lock may be held by another node, where this one cannot see it.
QUIET_SECONDS = 900.0
QUIET_STEPS = 20
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED"}
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay"}


def is_trained(
    run_dir: Path, job_state: str | None, idle_seconds: float | None, step_seconds: float | None
) -> bool:
    """Return whether some process trains the run.

    Args:
        job_state: Slurm's name of the state; None if no job is known.
        idle_seconds: time since the last row of its metrics; None if there are none.
        step_seconds: time of a step; None if there are no metrics.
    """
    if job_state is not None and job_state not in OVER:
        return job_state not in _WAITING
    locked = [is_locked(path) for path in (run_dir / LOCK_FILE, *_locks_of_plan(run_dir))]
    if True in locked:
        return True
    if not (run_dir / LOCK_FILE).exists() or (None not in locked and _is_local(run_dir)):
        return False
    quiet = max(QUIET_SECONDS, QUIET_STEPS * (step_seconds or 0.0))
    return idle_seconds is not None and idle_seconds < quiet


def _locks_of_plan(run_dir: Path) -> list[Path]:
    """Return the locks held while the plan is built, which precedes the training."""
    return list((run_dir / "plan").glob(".*.lock"))


def _is_local(path: Path) -> bool:
    """Return whether the file system is local, so that all of its locks are visible here."""
    place, kind = "", ""
    try:
        absolute = str(real_path(path))
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mounted, found, *_ = line.split()
            inside = absolute == mounted or absolute.startswith(mounted.rstrip("/") + "/")
            if inside and len(mounted) >= len(place):
                place, kind = mounted, found
    except (OSError, ValueError):
        return False
    return kind in _LOCAL
