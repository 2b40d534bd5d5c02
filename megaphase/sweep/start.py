"""Start the runs of a sweep file, or list them in a table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megaphase.launch.slurm.job_file import refuse_second_job
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.display import SweepDisplay
from megaphase.sweep.local import Machine, run_locally
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.sweep import Sweep, load_sweep
from megaphase.sweep.trial_checks import check_demands, check_run_files
from megaphase.sweep.trials import Trial, all_trials, count_trials, known_trials
from megaphase.utils.errors import RunError

NAMED_AT_MOST = 3


def sweep(path: Path, *, jobs: int, processes: int, retry: bool, console: Console) -> Path:
    """Train all runs of a sweep file on this machine; returns the sweep's directory.

    jobs: concurrent runs. processes: of each. retry: whether failed runs are restarted.

    Raises:
        InputError: the sweep file or a run file is invalid.
        RunError: some runs have failed; all others have ended.
        Stopped: a signal arrived, and the runs have saved.
    """
    found, directory = open_sweep(path)
    _refuse_jobs(found, directory)
    machine = Machine(jobs, processes, _gpus())
    if retry:
        directory.forget_failures()
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
    with SweepDisplay(console, found, total, ended) as display:
        outcomes = run_locally(found, directory, machine, display)
    refuse_failures(found, directory, outcomes)
    return directory.path


def open_sweep(path: Path) -> tuple[Sweep, SweepDirectory]:
    """Check a sweep file and the inputs of its runs; prepare its directory.

    Raises:
        InputError: the file is invalid, or the directory has runs with other settings.
    """
    found = load_sweep(path)
    _checked_trials(found)
    directory = SweepDirectory(found.output)
    for trial in known_trials(found, directory.known_outcomes(found)):
        directory.check_run_file(found, trial)
    directory.prepare(found)
    return found, directory


def _checked_trials(found: Sweep) -> list[Trial]:
    """Return all runs; raise InputError if the run file of one is invalid, or its arm wants more
    text than there is."""
    trials = all_trials(found)
    check_run_files(found, trials)
    check_demands(found, trials)
    return trials


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
            raise RunError(
                f"{missing} runs could not start: the first stages before them have "
                f"diverged with every peak; add lower peaks to {found.file}"
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


def dry_run_table(path: Path) -> Table:
    """Return a table of a sweep's runs by arm, and their optimizer steps."""
    found = load_sweep(path)
    trials = _checked_trials(found)
    runs = Counter(trial.arm for trial in trials)
    steps: Counter[str] = Counter()
    for trial in trials:
        steps[trial.arm] += trial.run["phases"][0]["steps"]
    table = Table(title=f"{found.output}: {len(trials)} runs", title_justify="left")
    table.add_column("arm")
    table.add_column("runs", justify="right")
    table.add_column("steps", justify="right")
    for arm, count in runs.items():
        table.add_row(arm, f"{count:,}", f"{steps[arm]:,}")
    table.add_row("all", f"{len(trials):,}", f"{steps.total():,}", style="bold")
    if found.warnings:
        table.caption = "\n".join(f"Warning: {each}" for each in found.warnings)
        table.caption_justify = "left"
    return table


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
