"""Run the trials of a sweep as SLURM arrays, in rounds: ended runs determine the next ones.

A round is a pipeline: arrays that train all runs that are ready, arrays that measure test losses
and score translations, and a small job after all of them that starts the next round.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megaphase.launch.slurm.job_file import (
    JOB_FILE,
    SubmittedJob,
    forget_jobs,
    read_job,
    remember_job,
)
from megaphase.launch.slurm.pipeline import Pipeline, job_and_log, scripts, submit_pipeline
from megaphase.launch.slurm.requeue import ENDED_AFTER
from megaphase.sweep.directory import SweepDirectory, run_file_text
from megaphase.sweep.display import SweepDisplay
from megaphase.sweep.file import ClusterJobs
from megaphase.sweep.measurements import EVALUATION, TRANSLATION, is_measured, measurements
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.planning.pruning import PendingRun, SweepState, sweep_state
from megaphase.sweep.slurm_round import (
    NEXT,
    Groups,
    array_size,
    groups_of,
    make_link,
    result_name,
    write_round,
)
from megaphase.sweep.start import checked_sweep, refuse_failures, say_warnings
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trial_run import collect_results, has_ended, last_line, outcome_if_ended
from megaphase.sweep.trials import Trial, all_trials, known_trials
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_text, last_lines, remove_directory
from megaphase.utils.slurm import own_job, queued_jobs

_DRY_RUN = "dry-run"
_ROUND = re.compile(r"round-(\d+)")
# Lines of a job's log: the last line of its script, the line of a rank before it, and Slurm's line
# if it has ended the job.
_GIVEN_UP = re.compile(r"megaphase: job \S+: ")
_RANK = re.compile(r"\S+: megaphase: ")
_CUT_OFF = re.compile(r"slurmstepd\S*: .*?\*\*\* (.* CANCELLED AT .*) \*\*\*")
_LAST_LINES = 5


def sweep_on_slurm(path: Path, program: Any, *, retry: bool, console: Console) -> Path | None:
    """Submit a round of a sweep's runs, unless one is in progress.

    program: the `megaphase` app. retry: whether failed runs are restarted.

    Returns the sweep's directory when all runs have ended, and None before.

    Raises:
        InputError: the sweep file or a run file is invalid.
        RunError: Slurm refuses a job or does not answer, another process runs this sweep, or all
            runs have ended and some of them have failed.
    """
    found, directory = checked_sweep(path)
    jobs = _cluster_jobs(found)
    say_warnings(found, console)
    with directory.locked():
        directory.prepare(found)
        if retry:
            directory.forget_failures()
        return SlurmSweep(found, directory, jobs, program, console).run_round()


def next_scripts(path: Path, program: Any) -> Iterator[tuple[str, Sequence[str], str]]:
    """Yield (name, earlier steps, batch script) of all jobs that would be submitted next.

    Their files are in a folder of their own, so that the sweep's directory is as it was.

    Raises:
        InputError: the sweep file or a run file is invalid, or a run is in the queue.
    """
    found, directory = checked_sweep(path)
    jobs = _cluster_jobs(found)
    pending_runs = sweep_state(found, directory.outcomes(), directory.rungs()).pending_runs
    folder = directory.slurm / _DRY_RUN
    remove_directory(folder)

    def write_run_file(trial: Trial, file: Path) -> None:
        atomic_write_text(file, run_file_text(trial))

    groups = groups_of(pending_runs, array_size())
    pipeline = write_round(
        found, directory, jobs, groups, folder, program, write_run_file=write_run_file
    )
    for name, script in scripts(pipeline).items():
        yield name, pipeline.steps[name].after, script


def _cluster_jobs(sweep: Sweep) -> ClusterJobs:
    if sweep.config.slurm is None:
        raise InputError(
            sweep.where("slurm"),
            "--slurm needs this section",
            "give the resources of a run's job, such as slurm: {gpus_per_node: 8}",
        )
    return sweep.config.slurm


@dataclass
class SlurmSweep:
    """Holds the sweep's lock while it collects the outcomes of jobs and submits others."""

    sweep: Sweep
    directory: SweepDirectory
    jobs: ClusterJobs
    program: Any
    console: Console

    def __post_init__(self) -> None:
        self.outcomes = self.directory.outcomes()
        self.next = read_job(self.directory.path)
        # Queried once: while this process holds the lock, jobs leave the queue, and none is added.
        runs = [path.name for path in self.directory.run("").iterdir()]
        jobs = {job.job for name in runs for job in self._jobs_of(name)}
        self.queue = queued_jobs(jobs if self.next is None else jobs | {self.next.job})

    def run_round(self) -> Path | None:
        state = self._collect_results()
        waiting = self._queued([pending.trial for pending in state.pending_runs])
        if waiting and self._next_is_queued():
            self._say_round_is_queued(waiting)
            return None
        # Only if nothing is in progress, since the next round knows best which other runs are
        # ready.
        pending_runs = [] if waiting else state.pending_runs
        if not waiting and not pending_runs:
            refuse_failures(self.sweep, self.directory, dict(state.outcomes))
            return self.directory.path
        self._submit(pending_runs, behind=waiting, ended=len(state.outcomes))
        return None

    def _collect_results(self) -> SweepState:
        """Record the outcomes of runs whose jobs have left the queue."""
        before = self.directory.known_outcomes(self.sweep)
        known = {trial.name for trial in known_trials(self.sweep, before)}
        ended = sum(name in known for name in before)
        display = SweepDisplay(self.console, self.sweep, len(all_trials(self.sweep)), ended)
        return collect_results(
            self.sweep,
            self.directory,
            display,
            self.outcomes,
            self._outcome_of,
            is_busy=lambda trial: bool(self._queued([trial])),
        )

    def _outcome_of(self, trial: Trial) -> Outcome | None:
        """Return a run's outcome; None if it is in progress or has not been started."""
        if self._queued([trial]):
            return None
        return outcome_if_ended(self.sweep, self.directory, trial) or self._failure(trial)

    def _failure(self, trial: Trial) -> Outcome | None:
        job = read_job(self.directory.run(trial.name), self._missing(trial))
        if job is None:
            return None
        log = Path(job.log)
        if ENDED_AFTER in "".join(_last_lines(log)[-1:]):
            # To be compared by a rule of `prune` that has been changed since.
            forget_jobs(self.directory.run(trial.name))
            return None
        # If a user cancels jobs and runs the command again, they should resume. The job that
        # starts the next round does not resume them, so a job that always ends without output is
        # not resubmitted forever.
        cut_off = _cut_off(log)
        if cut_off is not None and not self._is_the_next_job():
            return None
        if log.exists():
            with open(log, "rb") as source, open(self.directory.log(trial.name), "ab") as target:
                shutil.copyfileobj(source, target)
        return Outcome(failed=cut_off or _reason(log))

    def _missing(self, trial: Trial) -> str:
        """Return the file with the record of the job that a run without an outcome lacks."""
        if not has_ended(self.directory, trial):
            return JOB_FILE
        return next(
            each.job_file
            for each in measurements(self.sweep, trial)
            if not is_measured(self.sweep, self.directory, trial, each)
        )

    def _jobs_of(self, name: str) -> Iterator[SubmittedJob]:
        for file in (JOB_FILE, EVALUATION.job_file, TRANSLATION.job_file):
            if (job := read_job(self.directory.run(name), file)) is not None:
                yield job

    def _queued(self, trials: Sequence[Trial]) -> set[str]:
        """Return the jobs of these runs that have not ended."""
        return self.queue & {job.job for trial in trials for job in self._jobs_of(trial.name)}

    def _is_the_next_job(self) -> bool:
        return self.next is not None and self.next.job == own_job()

    def _next_is_queued(self) -> bool:
        """Return whether another job than this one starts the next round."""
        return self.next is not None and self.next.job in self.queue and not self._is_the_next_job()

    def _say_round_is_queued(self, waiting: set[str]) -> None:
        assert self.next is not None
        self._say(
            f"{self.directory.path}: {len(waiting)} jobs of runs are in the queue, and job "
            f"{self.next.job} after them starts the next round"
        )

    def _submit(self, pending_runs: Sequence[PendingRun], behind: set[str], ended: int) -> None:
        groups = groups_of(pending_runs, array_size())
        number = 1 + max(_rounds(self.directory), default=0)
        folder = self.directory.slurm / f"round-{number:03}"
        try:
            pipeline = write_round(
                self.sweep,
                self.directory,
                self.jobs,
                groups,
                folder,
                self.program,
                write_run_file=self._link_run_file,
            )
            self._link_results(groups, folder)
            jobs = submit_pipeline(pipeline, sorted(behind))
        except BaseException:
            remove_directory(folder)
            raise
        self._remember(pipeline, jobs, groups)
        total = len(all_trials(self.sweep))
        trained = f"round {number} trains {len(pending_runs)}"
        what = trained if pending_runs else f"{len(behind)} jobs of others are in the queue"
        self._say(f"{self.directory.path}: {total} runs, {ended} have ended; {what}")
        for name, job in jobs.items():
            self._say(f"Submitted: {name}, job {job}")
        self._say(f"Output: {pipeline.logs_folder}")
        self._say(f"Follow: squeue --jobs {','.join(jobs.values())}")
        self._say(f"Show results: megaphase report {shlex.quote(str(self.directory.path))}")

    def _link_run_file(self, trial: Trial, link: Path) -> None:
        make_link(link, self.directory.write_run_file(self.sweep, trial))

    def _link_results(self, groups: Groups, folder: Path) -> None:
        """Link the results of a run's measurements by task number, since a task of an array does
        not know its run's name."""
        for name, pending_runs in groups.items():
            for task, (trial, end_after) in enumerate(pending_runs):
                for each in measurements(self.sweep, trial) if end_after is None else ():
                    result = folder / name / result_name(each, task)
                    make_link(each.result(self.directory, trial.name), result)

    def _remember(self, pipeline: Pipeline, jobs: Mapping[str, str], groups: Groups) -> None:
        """Record which job starts the next round, and which ones measure."""
        remember_job(self.directory.path, *job_and_log(pipeline, NEXT, jobs[NEXT]))
        for group, pending_runs in groups.items():
            for each in measurements(self.sweep, pending_runs[0].trial):
                name = f"{group}-{each.name}"
                for task, (trial, _) in enumerate(pending_runs if name in jobs else []):
                    job, log = job_and_log(pipeline, name, jobs[name], task)
                    remember_job(self.directory.run(trial.name), job, log, each.job_file)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rounds(directory: SweepDirectory) -> list[int]:
    """Return the numbers of the submitted rounds."""
    folders = directory.slurm.glob("round-*")
    return [int(match[1]) for path in folders if (match := _ROUND.fullmatch(path.name))]


def _cut_off(log: Path) -> str | None:
    """Return why a job was ended from outside, in Slurm's words if there are any; else None."""
    lines = _last_lines(log)
    if not lines:
        return "its job has ended without a word"
    if lines[-1].startswith("megaphase: "):
        return None
    found = (_CUT_OFF.match(line) for line in reversed(lines))
    return next((match[1] for match in found if match), None)


def _reason(log: Path) -> str:
    """Return why a job has failed: a rank's last message, or the last line."""
    lines = _last_lines(log)
    if len(lines) > 1 and _GIVEN_UP.match(lines[-1]) and (found := _RANK.match(lines[-2])):
        return lines[-2][found.end() :]
    return last_line(log)


def _last_lines(log: Path) -> list[str]:
    return last_lines(log)[-_LAST_LINES:] if log.exists() else []
