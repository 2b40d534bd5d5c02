"""The record of a run's job, written into the run directory when the job is submitted."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import atomic_write_json, make_directory, read_json
from megaphase.utils.slurm import look_up

FOLDER = "slurm"  # in a run directory
JOB_FILE = "job.json"
EVALUATION_FILE = "evaluation.json"  # the same for the job that evaluates the run
TRANSLATION_FILE = "translation.json"  # and for the one that translates with it
OVER = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL"),
    *("OUT_OF_MEMORY", "DEADLINE"),
}


@dataclass(frozen=True)
class SubmittedJob:
    """The submitted job of a run: its id and the path of its log."""

    job: str
    log: str


def remember_job(run_dir: Path, number: str, log: Path, file: str = JOB_FILE) -> SubmittedJob:
    """Record which job trains a run."""
    folder, job = run_dir / FOLDER, SubmittedJob(number, str(log))
    make_directory(folder)
    atomic_write_json(folder / file, asdict(job))
    return job


def read_job(run_dir: Path, file: str = JOB_FILE) -> SubmittedJob | None:
    """Return the last job that was submitted for a run."""
    try:
        return SubmittedJob(**read_json(run_dir / FOLDER / file))
    except (OSError, ValueError, TypeError):
        return None


def forget_jobs(run_dir: Path) -> None:
    """Remove the records of jobs, and folders that are empty then."""
    for file in (JOB_FILE, EVALUATION_FILE, TRANSLATION_FILE):
        (run_dir / FOLDER / file).unlink(missing_ok=True)
    for folder in (run_dir / FOLDER, run_dir):
        with suppress(OSError):
            folder.rmdir()


def refuse_second_job(run_dir: Path) -> None:
    """Reject a run whose job is already queued or running.

    Raises:
        InputError: names the job.
        RunError: Slurm does not answer, so the job may be there.
    """
    job = read_job(run_dir)
    if job is None:
        return
    record = look_up(job.job)
    if not record.answered:
        raise RunError(
            f"{run_dir}: {record.unknown}, so job {job.job} of this run may be in the queue; try "
            f"again, or, if it has ended, remove {run_dir / FOLDER / JOB_FILE}"
        )
    state = record.fields.get("JobState")
    if state is not None and state not in OVER:
        raise InputError(
            run_dir,
            f"job {job.job} of this run is {state.lower()}",
            f"wait for it, or end it with `scancel {job.job}`",
        )
