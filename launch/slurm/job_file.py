"""Which jobs are a run's: written down in the run directory when they are submitted."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_json, make_directory, read_json
from megaphase.utils.slurm import job_fields

FOLDER = "slurm"  # in a run directory
JOB_FILE = "job.json"
TRANSLATION_FILE = "translation.json"  # likewise, of the job that translates with the run
OVER = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL"),
    *("OUT_OF_MEMORY", "DEADLINE"),
}


@dataclass(frozen=True)
class SubmittedJob:
    """What was submitted for a run: the id of the job and the path of its log."""

    job: str
    log: str


def remember_job(run_dir: Path, number: str, log: Path, file: str = JOB_FILE) -> SubmittedJob:
    """Write down which job trains a run."""
    folder, job = run_dir / FOLDER, SubmittedJob(number, str(log))
    make_directory(folder)
    atomic_write_json(folder / file, asdict(job))
    return job


def read_job(run_dir: Path, file: str = JOB_FILE) -> SubmittedJob | None:
    """The last job that was submitted for a run."""
    try:
        return SubmittedJob(**read_json(run_dir / FOLDER / file))
    except (OSError, ValueError, TypeError):
        return None


def forget_jobs(run_dir: Path) -> None:
    """As if none had been submitted; folders that are empty then are removed."""
    for file in (JOB_FILE, TRANSLATION_FILE):
        (run_dir / FOLDER / file).unlink(missing_ok=True)
    for folder in (run_dir / FOLDER, run_dir):
        with suppress(OSError):
            folder.rmdir()


def refuse_second_job(run_dir: Path) -> None:
    """Refuse a run that is in the queue, or at work, already.

    Raises:
        InputError: naming the job.
    """
    job = read_job(run_dir)
    state = job_fields(job.job).get("JobState") if job else None
    if job and state is not None and state not in OVER:
        raise InputError(
            run_dir,
            f"job {job.job} of this run is {state.lower()}",
            f"wait for it, or end it with `scancel {job.job}`",
        )
