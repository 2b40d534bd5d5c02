"""Start the runs of a sweep file, or list them in a table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from megaphase.launch.slurm.job_file import refuse_second_job
from megaphase.sweep.changes import refuse_other_inputs, refuse_other_measurements
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.display import SweepDisplay
from megaphase.sweep.local import Machine, run_locally, starter
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.planning.estimate import (
    TimeSource,
    budget_sentences,
    plan_of,
    plan_sentences,
    plan_table,
)
from megaphase.sweep.sweep import Sweep, load_sweep
from megaphase.sweep.trial_checks import check_demands, check_run_files
from megaphase.sweep.trials import all_trials, count_trials, known_trials
from megaphase.utils.errors import InputError, RunError

NAMED_AT_MOST = 3


def sweep(path: Path, *, jobs: int, processes: int, retry: bool, console: Console) -> Path:
    """Train all runs of a sweep file on this machine; returns the sweep's directory.

    jobs: concurrent runs. processes: of each. retry: whether failed runs are restarted.

    Raises:
        InputError: the sweep file or a run file is invalid.
        RunError: another process runs this sweep, or some runs have failed, and all others have
            ended.
        Stopped: a signal arrived, and the runs have saved.
    """
    found, directory = checked_sweep(path)
    machine = _machine(jobs, processes, gpus())
    with directory.locked():
        _refuse_jobs(found, directory)
        directory.prepare(found)
        if retry:
            directory.forget_failures()
        return _train(found, directory, machine, console)


def _train(found: Sweep, directory: SweepDirectory, machine: Machine, console: Console) -> Path:
    before = directory.known_outcomes(found)
    total = len(all_trials(found))
    names = {trial.name for trial in known_trials(found, before)}
    ended = sum(name in names for name in before)
    console.print(
        f"{directory.path}: {total} runs of up to {found.steps:,} steps, {ended} have ended",
        markup=False,
        soft_wrap=True,
    )
    say_warnings(found, console)
    with (
        SweepDisplay(console, found, total, ended) as display,
        starter(found, machine) as start,
    ):
        outcomes = run_locally(found, directory, machine, display, start)
    refuse_failures(found, directory, outcomes)
    return directory.path


def checked_sweep(path: Path) -> tuple[Sweep, SweepDirectory]:
    """Check a sweep file, the inputs of its runs, and its directory, in which nothing is written.

    Raises:
        InputError: the file or the run file of a run is invalid, an arm wants more text than there
            is, or the directory has runs with other settings.
    """
    found = load_sweep(path)
    trials = all_trials(found)
    check_run_files(found, trials)
    check_demands(found, trials)
    directory = SweepDirectory(found.output)
    # Before the outcomes, which lack losses of added tasks; runs without a source are always known.
    for trial in trials:
        if trial.source is None:
            directory.check_run_file(found, trial)
    outcomes = directory.known_outcomes(found)
    refuse_other_inputs(directory.sweep_file, found, outcomes.values())
    refuse_other_measurements(directory.path, directory.sweep_file, found, outcomes.values())
    for trial in known_trials(found, outcomes):
        directory.check_run_file(found, trial)
    return found, directory


def say_warnings(found: Sweep, console: Console) -> None:
    """Print what makes the sweep's results noisy."""
    for warning in found.warnings:
        console.print(f"Warning: {warning}", markup=False, highlight=False, soft_wrap=True)


def _refuse_jobs(found: Sweep, directory: SweepDirectory) -> None:
    """Raise InputError if runs, or the job that starts further ones, are in a queue."""
    refuse_second_job(directory.path)
    outcomes = directory.known_outcomes(found)
    for trial in known_trials(found, outcomes):
        if trial.name not in outcomes:
            refuse_second_job(directory.run(trial.name))


def refuse_failures(found: Sweep, directory: SweepDirectory, outcomes: dict[str, Outcome]) -> None:
    """Raise RunError if runs have failed, or could not start because others have no end."""
    known = known_trials(found, outcomes)
    failed = [trial.name for trial in known if _has_failed(outcomes.get(trial.name))]
    if not failed:
        if missing := count_trials(found) - len(known):
            pruned = "" if found.config.halving is None else " or were pruned"
            raise RunError(
                f"{missing} runs could not start: the first stages before them have "
                f"diverged{pruned} with every peak; add lower peaks to {found.file}"
            )
        return
    shown = ", ".join(failed[:NAMED_AT_MOST]) + (", …" if failed[NAMED_AT_MOST:] else "")
    reason = outcomes[failed[0]].failed
    raise RunError(
        f"{len(failed)} of {len(known)} runs have failed: {shown}; the first: {reason} (see "
        f"{directory.log(failed[0])}); the others have ended; --retry restarts the failed ones"
    )


def _has_failed(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.failed is not None


def dry_run(
    path: Path,
    console: Console,
    *,
    jobs: int = 1,
    processes: int = 1,
    trial: bool = False,
    card: str | None = None,
    budget: float | None = None,
) -> None:
    """Print what a sweep would train, how long that takes, and what a budget would leave out.

    jobs: concurrent runs. processes: of each. trial: whether a few steps are timed here. card: a
    GPU for which the time is computed instead. budget: hours; None: nothing is left out.

    Raises:
        InputError: the sweep file, a run file or an option is invalid.
        RunError: a timed run has failed.
    """
    if trial and card is not None:
        raise InputError("--card", "--trial is also given", "give one of them")
    found, _ = checked_sweep(path)
    source = TimeSource(card, _machine(jobs, processes, gpus() if trial else 0))
    say_warnings(found, console)

    def say(what: str) -> None:
        console.print(what, markup=False, highlight=False, soft_wrap=True)

    plan = plan_of(found, source, timed=trial, say=say)
    console.print(plan_table(plan))
    sentences = list(plan_sentences(plan))
    if budget is not None:
        sentences += budget_sentences(plan, budget)
    for sentence in sentences:
        say(sentence)


def _machine(jobs: int, processes: int, gpus: int) -> Machine:
    """Return this machine.

    Raises:
        InputError: the runs need more GPUs than there are, so some would train on CPUs.
    """
    needed = jobs * processes
    if needed > gpus > 0:
        raise InputError(
            "--jobs" if jobs > 1 else "--gpus",
            f"{jobs} concurrent runs with --gpus {processes} need {needed} GPUs, and here are "
            f"{gpus}",
            "lower --jobs or --gpus",
        )
    return Machine(jobs, processes, gpus)


def gpus() -> int:
    """Return the number of GPUs of this machine."""
    import torch

    return torch.cuda.device_count()
