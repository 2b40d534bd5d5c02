"""Shared memory, limits of a process, and SLURM's commands."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megaphase.doctor.finding import Finding, Settings, fault, first_line, ok, warning
from megaphase.utils.slurm import own_job

SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/dev/infiniband")
GB = 1e9
# A container has 64 MB in /dev/shm unless its start says otherwise.
LEAST_SHARED_GB, ENOUGH_SHARED_GB = 0.1, 1.0
LEAST_FILES, ENOUGH_FILES = 1024, 4096
SLURM_COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel")
SLURM_SECONDS = 10
# What SLURM's programs say where there is no slurm.conf, nor a server that has it.
NO_CLUSTER = "establish a configuration source"


def check_shared_memory(settings: Settings) -> Iterator[Finding]:
    """Check the free space of /dev/shm, which NCCL and worker processes need."""
    remedy = "start the container with --shm-size=8g or --ipc=host, or mount a larger /dev/shm"
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free / GB
    except OSError as error:
        yield fault(f"{SHARED_MEMORY} cannot be read ({error.strerror})", remedy)
        return
    found = f"{SHARED_MEMORY} has {free:.2f} GB free"
    if free < LEAST_SHARED_GB:
        yield fault(f"{found}; processes that share memory end with a bus error", remedy)
    elif free < ENOUGH_SHARED_GB:
        yield warning(f"{found}, less than the {ENOUGH_SHARED_GB:g} GB that NCCL may need", remedy)
    else:
        yield ok(found)


def check_limits(settings: Settings) -> Iterator[Finding]:
    """Check the limits of open files and, with InfiniBand, of locked memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = "without limit" if hard == resource.RLIM_INFINITY else f"up to {hard:,}"
    remedy = f"ulimit -n 65536 before the start (allowed: {allowed}; /etc/security/limits.conf)"
    if 0 <= soft < LEAST_FILES:
        yield fault(f"a process may open {soft:,} files at once", remedy)
    elif 0 <= soft < ENOUGH_FILES:
        yield warning(
            f"a process may open {soft:,} files at once, which many corpora and processes exceed",
            remedy,
        )
    else:
        files = "any number of" if soft == resource.RLIM_INFINITY else f"{soft:,}"
        yield ok(f"a process may open {files} files at once")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if INFINIBAND.is_dir() and locked != resource.RLIM_INFINITY:
        yield warning(
            f"a process may lock {locked / GB:.3f} GB of memory, and InfiniBand needs more",
            "ulimit -l unlimited (in a SLURM job: PropagateResourceLimitsExcept=MEMLOCK)",
        )


def check_slurm(settings: Settings) -> Iterator[Finding]:
    """Look for SLURM's commands, and ask its controller for the partitions."""
    there = [name for name in SLURM_COMMANDS if shutil.which(name)]
    if not there:
        yield ok("no SLURM on this machine; `megaphase launch local` needs none")
        return
    missing = [name for name in SLURM_COMMANDS if name not in there]
    if missing:
        yield warning(
            f"SLURM without {', '.join(missing)}",
            "on a compute node that is usual; on the login node install SLURM's client programs",
        )
    if "sinfo" not in there:
        return
    try:
        asked = subprocess.run(
            ["sinfo", "--noheader", "--format=%R"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SLURM_SECONDS,
        )
        silent = f"sinfo ended with exit code {asked.returncode}"
        problem = (asked.stderr.strip() or silent) if asked.returncode else ""
    except (subprocess.TimeoutExpired, OSError) as error:
        problem = str(error)
    if problem and NO_CLUSTER in problem:
        yield warning(
            "SLURM's programs are installed, but this machine belongs to no cluster",
            "set SLURM_CONF to the cluster's slurm.conf, or use `megaphase launch local`",
        )
        return
    if problem:
        yield fault(
            f"SLURM's controller does not answer ({first_line(problem.strip().splitlines()[-1])})",
            "check `scontrol ping` and the network, or ask the cluster's administrators",
        )
        return
    partitions = sorted(set(asked.stdout.split()))
    job = own_job()
    yield ok(f"SLURM answers, partitions {', '.join(partitions)}{f'; in job {job}' if job else ''}")
