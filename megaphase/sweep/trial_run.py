"""One run of a sweep: its commands, whether it has ended, and its outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megaphase.checkpoint.names import find_in_run
from megaphase.launch.slurm.job_file import forget_jobs
from megaphase.report.load_run import load_run
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.display import SweepDisplay
from megaphase.sweep.measurements import is_measured, last_phase, measurements, read_outcome
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.planning.pruning import (
    Losses,
    PendingRun,
    SweepState,
    compared_settings,
    sweep_state,
    with_pruned,
)
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial
from megaphase.utils.errors import InputError
from megaphase.utils.files import last_lines


def train_arguments(
    directory: SweepDirectory,
    trial: Trial,
    run_file: Path,
    processes: int,
    end_after: int | None = None,
) -> list[str]:
    """Return the arguments of `megaphase` that train a run.

    end_after: the step after which it ends, to be resumed or not; None: at the end of its phase.
    """
    overrides = [] if end_after is None else [f"checkpoint.end_after={end_after}"]
    source = []
    if trial.source is not None:
        source = ["--from", f"{directory.run(trial.source)}@{trial.source_phase}"]
    if processes == 1:
        return ["train", str(run_file), *overrides, *source]
    return ["launch", "local", str(run_file), *overrides, "--processes", str(processes), *source]


def has_diverged(directory: SweepDirectory, trial: Trial) -> bool:
    """Return whether a run has ended because it diverged."""
    try:
        return load_run(directory.run(trial.name)).ended_diverged is not None
    except (InputError, OSError):  # it has not started, or failed before its first step
        return False


def has_ended(directory: SweepDirectory, trial: Trial) -> bool:
    """Return whether a run has saved the checkpoint at the end of its last phase."""
    try:
        find_in_run(directory.run(trial.name), last_phase(trial))
    except InputError:
        return False
    return True


def outcome_if_ended(sweep: Sweep, directory: SweepDirectory, trial: Trial) -> Outcome | None:
    """Return a run's outcome; None if it has not ended, or is still to be measured."""
    if has_diverged(directory, trial):
        return read_outcome(sweep, directory, trial)
    if not has_ended(directory, trial):
        return None
    if not all(is_measured(sweep, directory, trial, each) for each in measurements(sweep, trial)):
        return None
    return read_outcome(sweep, directory, trial)


def note_rungs(
    sweep: Sweep,
    directory: SweepDirectory,
    outcomes: Mapping[str, Outcome],
    rungs: dict[str, Mapping[int, Losses]],
    is_busy: Callable[[Trial], bool],
) -> None:
    """Record the validation losses of runs at the steps at which their settings are compared.

    outcomes: of the runs that have ended or were pruned. rungs: what is recorded; added to.
    is_busy: whether a run is being trained; such a run is left alone.
    """
    if sweep.config.halving is None:
        return
    for compared in compared_settings(sweep, outcomes):
        for trial in compared.trials:
            known = rungs.get(trial.name, {})
            missing = [step for step in compared.steps if step not in known]
            if not missing or not directory.metrics(trial.name).exists() or is_busy(trial):
                continue
            found = {
                row.step: {task: measured.loss for task, measured in row.validation.items()}
                for row in load_run(directory.run(trial.name)).validation
                if row.step in missing
            }
            if found:
                # A job that has reached such a step has not failed.
                forget_jobs(directory.run(trial.name))
                rungs[trial.name] = {**known, **found}
                directory.write_rungs(trial.name, rungs[trial.name])


def release_checkpoints(
    sweep: Sweep,
    directory: SweepDirectory,
    trials: Sequence[Trial],
    outcomes: Mapping[str, Outcome],
) -> None:
    """Remove the checkpoints that the sweep file does not keep; a failed run needs its own to
    resume.
    """
    if sweep.config.keep_checkpoints == "all":
        return
    for trial in trials:
        if trial.is_final and trial.name in outcomes and outcomes[trial.name].failed is None:
            directory.remove_checkpoints(trial.name)


def collect_results(
    sweep: Sweep,
    directory: SweepDirectory,
    display: SweepDisplay,
    outcomes: dict[str, Outcome],
    find_outcome: Callable[[Trial], Outcome | None],
    is_busy: Callable[[Trial], bool] = lambda trial: False,
) -> SweepState:
    """Record what runs have come to that have ended unobserved, and remove checkpoints that are not
    kept; returns what is then known of the sweep.

    outcomes: of all runs known to have ended; added to. find_outcome: returns a trial's outcome, or
        None. is_busy: whether a run is being trained.
    """
    rungs = directory.rungs()
    known = with_pruned(sweep, outcomes, rungs)
    collected = True
    while collected:  # each outcome may determine further runs
        collected = False
        note_rungs(sweep, directory, with_pruned(sweep, outcomes, rungs), rungs, is_busy)
        state = sweep_state(sweep, outcomes, rungs)
        for trial in state.trials:
            if trial.name not in state.outcomes and (outcome := find_outcome(trial)) is not None:
                directory.write_outcome(trial.name, outcome)
                outcomes[trial.name] = outcome
                display.end(trial, outcome, {**state.outcomes, **outcomes})
                collected = True
    for trial in state.trials:
        if trial.name not in known and state.outcomes.get(trial.name, Outcome()).pruned:
            display.end(trial, state.outcomes[trial.name], state.outcomes)
    release_checkpoints(sweep, directory, state.trials, state.outcomes)
    # A run that stopped early, before the step of a comparison, may still have to be measured.
    pending_runs = [
        pending
        if pending.end_after is None or not has_ended(directory, pending.trial)
        else PendingRun(pending.trial, None)
        for pending in state.pending_runs
    ]
    return replace(state, pending_runs=pending_runs)


def last_line(log: Path) -> str:
    """Return the last message of a run, without the program's name."""
    lines = last_lines(log) if log.exists() else []
    return lines[-1].removeprefix("megaphase: ") if lines else ""
