"""Decide what happens after a start of a job: it is done, requeues itself, or gives up."""

from __future__ import annotations

import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megaphase.checkpoint.state import checkpoint_folders, step_of
from megaphase.launch.slurm.job_file import FOLDER
from megaphase.utils.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_WRONG_INPUT, RunError
from megaphase.utils.files import atomic_write_json, os_errors_named, read_json
from megaphase.utils.run_files import CHECKPOINTS
from megaphase.utils.slurm import control, host_names, job_fields, partition_nodes

CHAIN_FILE = "chain.json"
ENDED_AFTER = "has ended the run; it can be resumed"
_NONE = "(null)"
_END_SECONDS = 60.0


@dataclass(frozen=True)
class RestartHistory:
    """The starts of a job so far.

    Attributes:
        job: its id.
        step: step of the newest checkpoint after the last start.
        without_progress: number of starts in a row that have not produced a newer one.
    """

    job: str
    step: int = 0
    without_progress: int = 0

    def after_start(self, step: int) -> RestartHistory:
        """Return the history with one more start; step: of the newest checkpoint now."""
        stuck = 0 if step > self.step else self.without_progress + 1
        return RestartHistory(self.job, max(step, self.step), stuck)


@dataclass(frozen=True)
class RequeueDecision:
    """The decision: whether the job is requeued, why, and the exit code if it is not."""

    again: bool
    sentence: str
    exit_code: int


def decide(
    history: RestartHistory,
    code: int,
    restarts: int,
    *,
    diverged: bool = False,
    end_after: int | None = None,
) -> RequeueDecision:
    """Decide after a start that ended with an exit code.

    history: includes that start. restarts: number of starts in a row that may make no progress.
    diverged: whether the run has ended because it diverged. end_after: `checkpoint.end_after`, if
        it has ended the run before all phases are done.
    """
    if code == 0 and end_after is not None:
        sentence = f"checkpoint.end_after: {end_after:,} {ENDED_AFTER}"
        return RequeueDecision(False, sentence, 0)
    if code == 0:
        return RequeueDecision(False, "all phases are done", 0)
    if code == EXIT_WRONG_INPUT:
        return RequeueDecision(False, "the input is wrong, see above; not requeued", code)
    if diverged and code == EXIT_FAILED:
        return RequeueDecision(False, "the run has diverged, see above; not requeued", code)
    what = "stopped by a signal" if code == EXIT_REQUEUE else f"failed with exit code {code}"
    reached = f"the newest checkpoint is that of step {history.step:,}"
    if history.without_progress > restarts:
        plural = "s" if history.without_progress > 1 else ""
        starts = f"{history.without_progress} start{plural} in a row produced no newer one"
        return RequeueDecision(False, f"{what}; {reached}, and {starts}; not requeued", EXIT_FAILED)
    return RequeueDecision(True, f"{what}; {reached}; requeued", EXIT_REQUEUE)


def read_restart_history(run_dir: Path, job: str, newest: int) -> RestartHistory:
    """Return the history of this job; if another one was before it, only its last step.

    newest: step of the newest checkpoint now. If it is lower, the user has removed later ones
        before this job, and steps from there on are progress.
    """
    try:
        history = RestartHistory(**read_json(run_dir / FOLDER / CHAIN_FILE))
    except (OSError, ValueError, TypeError):
        history = RestartHistory(job)
    return history if history.job == job else RestartHistory(job, min(history.step, newest))


def write_restart_history(run_dir: Path, history: RestartHistory) -> None:
    """Store the history of a job."""
    path = run_dir / FOLDER / CHAIN_FILE
    with os_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, asdict(history))


def newest_step(run_dir: Path) -> int:
    """Return the step of a run's newest checkpoint, by its name; 0 if there is none."""
    folders = checkpoint_folders(run_dir / CHECKPOINTS)
    return max((step_of(folder.name) or 0 for folder in folders), default=0)


def too_few_nodes(job: str, leave_out: str) -> str | None:
    """Return why a job could not start without these nodes and its excluded ones, or None."""
    fields = job_fields(job)
    partition = fields.get("Partition", "")
    there = set(partition_nodes(partition))
    left = there - set(host_names(leave_out)) - set(host_names(fields.get("ExcNodeList", _NONE)))
    needed = int(fields.get("NumNodes", "0").split("-")[0])
    if len(left) >= needed:
        return None
    return f"without {leave_out} partition {partition} has {len(left)} of {needed} nodes"


def queue_again(job: str, leave_out: str) -> None:
    """Requeue the job in which this process runs, which ends this process.

    leave_out: comma-separated names of nodes to exclude from then on.

    Raises:
        RunError: Slurm refuses.
    """
    excluded = job_fields(job).get("ExcNodeList", _NONE)
    # Slurm ends everything that the job has started, with SIGTERM first, so there is time for
    # changes that are only possible when the job is pending. Not before, so that cancelling the
    # job works.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if refused := control("requeue", job):
        raise RunError(f"job {job}: cannot be requeued ({refused})")
    if leave_out:
        nodes = leave_out if excluded == _NONE else f"{excluded},{leave_out}"
        if refused := control("update", f"JobId={job}", f"ExcNodeList={nodes}"):
            raise RunError(f"job {job}: nodes {nodes} cannot be excluded ({refused})")
    time.sleep(_END_SECONDS)
