"""Slurm's commands: jobs are submitted, looked at, and queued again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from megaphase.utils.errors import InputError, RunError


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
    # A job inherits the environment: what this one was given, should it be a job, is not for it.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    result = subprocess.run(
        command, input=script, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RunError(f"sbatch refused the job: {' '.join(result.stderr.split())}")
    return result.stdout.strip().split(";")[0]


def cancel(*jobs: str) -> None:
    """Take jobs from the queue."""
    subprocess.run(["scancel", *jobs], check=False)


@dataclass(frozen=True)
class JobRecord:
    """What Slurm says of a job.

    Attributes:
        fields: of `scontrol show job`, by name; empty where it says nothing.
        unknown: why it says nothing, else None.
    """

    fields: dict[str, str] = field(default_factory=dict)
    unknown: str | None = None


def look_up(job: str) -> JobRecord:
    """Ask Slurm for a job; of an array, for its first task."""
    try:
        found = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", job],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return JobRecord(unknown="there is no Slurm on this machine")
    if found.returncode:
        reason = " ".join(found.stderr.split())
        gone = "Invalid job id" in reason
        return JobRecord(
            unknown="no longer known to Slurm" if gone else f"Slurm does not answer ({reason})"
        )
    line = found.stdout.partition("\n")[0]
    # Values may have spaces; names have none and begin with a capital. What users write themselves,
    # such as a comment, stands at the end: the first of two fields of a name is Slurm's.
    pairs = [pair.partition("=") for pair in re.split(r" (?=[A-Z][A-Za-z_:/]*=)", line)]
    return JobRecord({key: value for key, _, value in reversed(pairs)})


def job_fields(job: str) -> dict[str, str]:
    """What `scontrol show job` says, by field; empty where Slurm does not know the job."""
    return look_up(job).fields


def queued_jobs(jobs: Collection[str]) -> set[str]:
    """Those of these jobs, or tasks of arrays, that wait, run or are just ending.

    Raises:
        RunError: Slurm does not answer.
    """
    if not jobs:
        return set()
    numbers = sorted({job.partition("_")[0] for job in jobs})
    try:
        found = _lines(
            "squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(numbers)}"
        )
    except RunError as error:
        # Said of a single job that has been forgotten; of several, those are left out.
        if "Invalid job id" not in str(error):
            raise
        return set()
    return set(jobs).intersection(found)


def control(*arguments: str) -> str | None:
    """Call scontrol; why it refused, or None."""
    result = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)
    return " ".join((result.stderr or result.stdout).split()) if result.returncode else None


def host_names(expression: str) -> list[str]:
    """The nodes that Slurm writes as n[1-3],n7; none for (null)."""
    if expression in ("", "(null)"):
        return []
    return _lines("scontrol", "show", "hostnames", expression)


def partition_nodes(partition: str) -> list[str]:
    """The nodes of a partition, whatever their state."""
    return _lines("sinfo", "--noheader", "--Node", "--format=%N", f"--partition={partition}")


def _lines(*command: str) -> list[str]:
    """What a command prints.

    Raises:
        RunError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{command[0]}: {' '.join(done.stderr.split())}")
    return done.stdout.splitlines()
