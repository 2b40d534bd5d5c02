"""Slurm's commands: jobs are submitted, looked at, and queued again."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from megaphase.errors import InputError, RunError


def require_sbatch(where: str, remedy: str) -> None:
    """Refuse a machine that cannot submit jobs.

    Raises:
        InputError: there is no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise InputError(where, "there is no sbatch on this machine", remedy)


def submit(script: str, options: Sequence[str] = ()) -> str:
    """Hand a batch script to sbatch; the id of the job.

    Raises:
        RunError: sbatch refuses it.
    """
    command = ["sbatch", "--parsable", *options]
    result = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RunError(f"sbatch refused the job: {' '.join(result.stderr.split())}")
    return result.stdout.strip().split(";")[0]


def cancel(*jobs: str) -> None:
    """Take jobs from the queue."""
    subprocess.run(["scancel", *jobs], check=False)


def job_fields(job: str) -> dict[str, str]:
    """What `scontrol show job` says, by field; empty where Slurm no longer knows the job."""
    try:
        found = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", job],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return {}
    pairs = (word.partition("=") for word in found.stdout.split() if "=" in word)
    return {key: value for key, _, value in pairs}


def control(*arguments: str) -> str | None:
    """Call scontrol; why it refused, or None."""
    result = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)
    return " ".join((result.stderr or result.stdout).split()) if result.returncode else None
