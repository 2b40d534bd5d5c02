"""Slurm commands: submit, query, cancel and requeue jobs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megaphase.utils.errors import InputError, RunError

# In a job, where nobody is there to give a command again, it is repeated for so long while the
# controller does not answer.
RETRY_SECONDS, RETRY_EVERY_SECONDS = 300.0, 15.0
# Slurm's default for MaxArraySize.
USUAL_ARRAY_SIZE = 1001
_NOT_REACHED = re.compile(
    "unable to contact|connect failure|connection refused|no route to host|temporarily unable", re.I
)
_NO_ANSWER = re.compile(
    f"{_NOT_REACHED.pattern}|timed out|zero bytes|connection reset|not connected", re.I
)
_ARRAY_LIMIT = re.compile(r"\b(?:MaxArraySize *=|max_array_tasks=) *(\d+)")
_OPTION = re.compile(r"--([a-z-]+)(?:=.*)?", re.DOTALL)
_DIRECTIVE = re.compile(r"^#SBATCH (.*)$", re.MULTILINE)
_JOB_ID = re.compile(r"^(\d+)(?:;\S+)?$", re.MULTILINE)  # behind the semicolon is a cluster
# Variables that apply to sbatch even if this process is a job itself.
_FOR_ALL_COMMANDS = ("SLURM_CONF", "SLURM_CLUSTERS")
_CLUSTERS = "set SLURM_CLUSTERS, which all of Slurm's commands follow"


def require_sbatch(where: str, remedy: str) -> None:
    """Raise an error on a machine that cannot submit jobs.

    Raises:
        InputError: there is no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise InputError(where, "there is no sbatch on this machine", remedy)


def sbatch_options(text: str, refused: Mapping[str, str]) -> list[str]:
    """Parse additional options of sbatch as a shell would.

    refused: maps the name of each option that is not allowed to the remedy.

    Raises:
        InputError: one is not of the form --NAME=VALUE, or is not allowed.
    """
    try:
        options = shlex.split(text)
    except ValueError as error:
        raise InputError("--sbatch", f"cannot be parsed ({error})", "check quotes") from None
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None:
            raise InputError(
                "--sbatch", f"{option!r} is not an option", "write --NAME=VALUE, or --NAME"
            )
        if remedy := {"clusters": _CLUSTERS, **refused}.get(match[1]):
            raise InputError("--sbatch", f"--{match[1]} is not allowed there", remedy)
    return options


def max_array_size() -> int | None:
    """Return how many tasks an array may have on this cluster; None if Slurm does not say."""
    try:
        found = _run(["scontrol", "show", "config"])
    except OSError:
        return None
    return min(map(int, _ARRAY_LIMIT.findall(found.stdout)), default=None)


def refuse_large_array(where: str, tasks: int, remedy: str) -> None:
    """Raise an error if an array has more tasks than this cluster allows, as far as is known.

    remedy: {most} in it stands for the limit.

    Raises:
        InputError: sbatch would refuse the array, and name neither the limit nor a remedy.
    """
    most = max_array_size()
    if most is not None and tasks > most:
        limit = f"at most {most:,} (MaxArraySize, max_array_tasks)"
        problem = f"{tasks:,} tasks, but this cluster's arrays take {limit}"
        raise InputError(where, problem, remedy.format(most=most))


def submit(script: str, options: Sequence[str] = ()) -> str:
    """Submit a batch script with sbatch and return the job's id.

    Raises:
        InputError: another cluster is set for sbatch than for the other commands.
        RunError: sbatch refuses it, or does not print an id.
    """
    if "SBATCH_CLUSTERS" in os.environ:
        raise InputError("SBATCH_CLUSTERS", "only sbatch follows it", f"unset it, and {_CLUSTERS}")
    # Variables such as SBATCH_ACCOUNT take the place of options in a script, but not of arguments.
    own = [option for line in _DIRECTIVE.findall(script) for option in shlex.split(line)]
    command = ["sbatch", "--parsable", *own, *options]
    # A job inherits the environment; if this process is a job itself, its variables do not apply.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name in _FOR_ALL_COMMANDS
    }
    # A request that was sent may have been met, and a second one would be a second job.
    result = _run(command, unanswered=_NOT_REACHED, input=script, env=environment)
    if result.returncode:
        raise RunError(f"sbatch refused the job: {' '.join(result.stderr.split())}")
    # A site's wrapper of sbatch may print lines of its own.
    if not (ids := _JOB_ID.findall(result.stdout)):
        said = " ".join(f"{result.stdout} {result.stderr}".split())
        raise RunError(f"sbatch did not print the job's id, but: {said}; see `squeue --me`")
    return str(ids[-1])


def cancel(*jobs: str) -> None:
    """Cancel jobs."""
    subprocess.run(["scancel", *jobs], check=False)


def own_job() -> str | None:
    """Return the id of the job in which this process runs, or None; of an array, the task's.

    Not SLURM_JOB_ID: that of an array's last task is the id of the array, and what is done to it
    is done to all tasks.
    """
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    if array is not None and task is not None:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID")


def is_restarted() -> bool:
    """Return whether this process belongs to a job that has been requeued."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


@dataclass(frozen=True)
class JobRecord:
    """Slurm's information about a job.

    Attributes:
        fields: the fields of `scontrol show job` by name; empty if there are none.
        unknown: why there are none, else None.
        answered: whether Slurm has answered, if there is one.
    """

    fields: dict[str, str] = field(default_factory=dict)
    unknown: str | None = None
    answered: bool = True


def look_up(job: str) -> JobRecord:
    """Query a job; for an array, its first task."""
    try:
        found = _run(["scontrol", "show", "job", "--oneliner", job])
    except OSError:
        return JobRecord(unknown="there is no Slurm on this machine")
    if found.returncode:
        reason = " ".join(found.stderr.split())
        gone = "Invalid job id" in reason
        if gone:
            return JobRecord(unknown="no longer known to Slurm")
        return JobRecord(unknown=f"Slurm does not answer ({reason})", answered=False)
    line = found.stdout.partition("\n")[0]
    # Values may contain spaces; names do not, and begin with a capital. Text written by users, such
    # as a comment, comes last: of two fields with the same name, the first is Slurm's.
    pairs = [pair.partition("=") for pair in re.split(r" (?=[A-Z][A-Za-z_:/]*=)", line)]
    return JobRecord({key: value for key, _, value in reversed(pairs)})


def job_fields(job: str) -> dict[str, str]:
    """Return the fields of `scontrol show job`; empty if Slurm does not know the job."""
    return look_up(job).fields


def queued_jobs(jobs: Collection[str]) -> set[str]:
    """Return those of these jobs, or tasks of arrays, that are pending, running or ending.

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
        # Slurm reports this for a single forgotten job; in a list, it leaves forgotten jobs out.
        if "Invalid job id" not in str(error):
            raise
        return set()
    return set(jobs).intersection(found)


def control(*arguments: str) -> str | None:
    """Call scontrol; return why it refused, or None."""
    result = _run(["scontrol", *arguments])
    return " ".join((result.stderr or result.stdout).split()) if result.returncode else None


def host_names(expression: str) -> list[str]:
    """Expand Slurm's list of nodes, such as n[1-3],n7; return none for (null)."""
    if expression in ("", "(null)"):
        return []
    return _lines("scontrol", "show", "hostnames", expression)


def partition_nodes(partition: str) -> list[str]:
    """Return the nodes of a partition in any state."""
    return _lines("sinfo", "--noheader", "--Node", "--format=%N", f"--partition={partition}")


def _lines(*command: str) -> list[str]:
    """Run a command and return the lines it prints.

    Raises:
        RunError: it failed.
    """
    done = _run(command)
    if done.returncode:
        raise RunError(f"{command[0]}: {' '.join(done.stderr.split())}")
    return done.stdout.splitlines()


def _run(
    command: Sequence[str], unanswered: re.Pattern[str] = _NO_ANSWER, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command; in a job, repeat it while the controller does not answer.

    Args:
        unanswered: matches the output of a command that the controller has not answered.
        options: passed on to subprocess.run.
    """
    until = time.monotonic() + (0.0 if own_job() is None else RETRY_SECONDS)
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        said = done.stderr + done.stdout
        if done.returncode == 0 or not unanswered.search(said) or time.monotonic() >= until:
            return done
        time.sleep(RETRY_EVERY_SECONDS)
