"""A sweep's directory: the paths in it, and the check that it belongs to this sweep file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel

from megaphase.launch.slurm.job_file import forget_jobs
from megaphase.report.measured import Measured
from megaphase.sweep.changes import record_change
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.planning.pruning import Losses, with_pruned
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial, known_trials
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import (
    atomic_write_text,
    make_directory,
    os_errors_named,
    remove_directory_at_once,
)
from megaphase.utils.json_models import read_record
from megaphase.utils.locks import exclusive_lock
from megaphase.utils.run_files import CHECKPOINTS, METRICS_FILE
from megaphase.utils.set_aside import make_way_for_directory
from megaphase.utils.yaml_file import read_yaml

SWEEP_FILE = "sweep.json"
REMEDY = "give the directory of a megaphase sweep"
GIVE_AGAIN = "remove the file, and give the sweep command again"
NAMED_KEYS = 3


class _Rungs(BaseModel):
    """The validation losses of a run by step and task, at the steps at which it is compared."""

    losses: dict[int, dict[str, Measured]]


@dataclass(frozen=True)
class SweepDirectory:
    """The paths in a sweep's directory."""

    path: Path

    @property
    def sweep_file(self) -> Path:
        """The parsed sweep file."""
        return self.path / SWEEP_FILE

    def run_file(self, name: str) -> Path:
        return self.path / "run-files" / f"{name}.yaml"

    def run(self, name: str) -> Path:
        """Return a run directory, with the same content as that of any other run."""
        return self.path / "runs" / name

    def metrics(self, name: str) -> Path:
        """Return the file of a run's metrics."""
        return self.run(name) / METRICS_FILE

    def log(self, name: str) -> Path:
        """Return the log with a run's output over all of its starts."""
        return self.path / "logs" / f"{name}.log"

    @property
    def slurm(self) -> Path:
        """The folder of what was submitted to a cluster, with a folder for each round."""
        return self.path / "slurm"

    def scores_file(self, name: str) -> Path:
        """Return the file with the results of `megaphase translate` for a run."""
        return self.path / "scores" / f"{name}.json"

    def losses_file(self, name: str) -> Path:
        """Return the file with the results of `megaphase evaluate` for a run."""
        return self.path / "losses" / f"{name}.json"

    def outcome_file(self, name: str) -> Path:
        """Return the file that exists as soon as the run has ended."""
        return self.path / "outcomes" / f"{name}.json"

    def rungs_file(self, name: str) -> Path:
        """Return the file with a run's losses at the steps at which settings are compared."""
        return self.path / "rungs" / f"{name}.json"

    def prepare(self, sweep: Sweep) -> None:
        """Write the sweep into its directory, which is new or from an earlier start of the sweep.

        Changes of the sweep file since then are recorded; see `record_change`.
        """
        rungs = () if sweep.config.halving is None else ("rungs",)
        for folder in ("run-files", "runs", "logs", "losses", "scores", "outcomes", *rungs):
            with os_errors_named(self.path):
                make_way_for_directory(self.path / folder, "a directory of the sweep")
            make_directory(self.path / folder)
        record_change(self.path, self.sweep_file, sweep, ended=len(self.outcomes()))
        atomic_write_text(self.sweep_file, sweep.model_dump_json(indent=2) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Prevent other processes from starting runs of this sweep.

        Raises:
            RunError: another process is already doing so.
        """

        def refuse() -> NoReturn:
            raise RunError(f"{self.path}: another process runs this sweep; wait until it ends")

        with os_errors_named(self.path):
            make_directory(self.path)
        with exclusive_lock(self.path / ".lock", refuse):
            yield

    def write_run_file(self, sweep: Sweep, trial: Trial) -> Path:
        """Write a run's file, or check that the existing one is the same; see `check_run_file`."""
        self.check_run_file(sweep, trial)
        path = self.run_file(trial.name)
        if not path.exists():
            atomic_write_text(path, run_file_text(trial))
        return path

    def check_run_file(self, sweep: Sweep, trial: Trial) -> None:
        """Reject a run for which a file with other settings exists.

        Raises:
            InputError: names that file.
        """
        path = self.run_file(trial.name)
        if not path.exists() or path.read_bytes() == run_file_text(trial).encode():
            return
        before = read_yaml(path)
        if not (changed := list(_different_keys(before, trial.run))):
            return
        raise InputError(
            sweep.file,
            f"{path} was written with other values of {', '.join(changed[:NAMED_KEYS])}"
            + (", …" if changed[NAMED_KEYS:] else ""),
            "put them back, or choose another output; only arms, rates, peaks and seeds may "
            "be added or removed, and neither the sweep's directory nor its inputs may be moved",
        )

    def write_outcome(self, name: str, outcome: Outcome) -> None:
        """Record that a run has ended."""
        text = outcome.model_dump_json(indent=2, exclude_defaults=True) + "\n"
        atomic_write_text(self.outcome_file(name), text)

    def write_rungs(self, name: str, losses: Mapping[int, Losses]) -> None:
        """Record a run's validation losses at the steps at which it is compared."""
        record = _Rungs(losses={step: dict(each) for step, each in losses.items()})
        atomic_write_text(self.rungs_file(name), record.model_dump_json(indent=2) + "\n")

    def rungs(self) -> dict[str, Mapping[int, Losses]]:
        """Return the recorded losses of all runs, by name and step."""
        files = sorted((self.path / "rungs").glob("*.json"))
        return {file.stem: read_record(file, _Rungs, "remove it").losses for file in files}

    def remove_checkpoints(self, name: str) -> None:
        """Remove the checkpoints of a run, if there are any."""
        remove_directory_at_once(self.run(name) / CHECKPOINTS)

    def forget_failures(self) -> None:
        """Allow the failed runs to be restarted."""
        for name, outcome in self.outcomes().items():
            if outcome.failed is not None:
                # What they left behind must not be mistaken for the end of the next start.
                forget_jobs(self.run(name))
                self.losses_file(name).unlink(missing_ok=True)
                self.scores_file(name).unlink(missing_ok=True)
                self.outcome_file(name).unlink()

    def outcomes(self) -> dict[str, Outcome]:
        """Return the outcomes of all runs that have ended, by name."""
        files = sorted((self.path / "outcomes").glob("*.json"))
        return {file.stem: read_record(file, Outcome, GIVE_AGAIN) for file in files}

    def known_outcomes(self, sweep: Sweep) -> dict[str, Outcome]:
        """Return the outcomes of all runs that have ended or were pruned, by name.

        Raises:
            InputError: a file is damaged, or one has no loss of a task.
        """
        outcomes = self.outcomes()
        for name, outcome in outcomes.items():
            self._check_outcome(sweep, name, outcome)
        return with_pruned(sweep, outcomes, self.rungs())

    def _check_outcome(self, sweep: Sweep, name: str, outcome: Outcome) -> None:
        if not outcome.can_be_branched:
            return
        tables = {
            "losses": outcome.losses,
            "bits_per_byte": outcome.bits_per_byte,
            "test": outcome.test,
            "test_bits_per_byte": outcome.test_bits_per_byte,
        }
        for key, table in tables.items():
            for task in (*sweep.high, *sweep.low):
                # Outcomes of earlier versions, or of sweeps without a test split, lack some.
                if task not in table and (table or key == "losses"):
                    raise InputError(
                        self.outcome_file(name), f"{key}: has no value of {task}", GIVE_AGAIN
                    )


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as recorded in its directory, complete or not.

    Attributes:
        trials: all runs known so far.
        outcomes: of the runs that have ended or were pruned, by name.
    """

    directory: SweepDirectory
    sweep: Sweep
    trials: list[Trial]
    outcomes: Mapping[str, Outcome]


def is_sweep(folder: Path) -> bool:
    """Return whether this is the directory of a sweep."""
    return (folder / SWEEP_FILE).is_file()


def load_sweep_record(folder: Path) -> SweepRecord:
    """Read a sweep's directory; corpora and tokenizer need not exist any more.

    Raises:
        InputError: a file is missing or invalid.
    """
    directory = SweepDirectory(folder)
    sweep = read_record(directory.sweep_file, Sweep, REMEDY)
    outcomes = directory.known_outcomes(sweep)
    trials = known_trials(sweep, outcomes)
    names = {trial.name for trial in trials}
    return SweepRecord(
        directory, sweep, trials, {name: each for name, each in outcomes.items() if name in names}
    )


def _different_keys(one: Any, other: Any, key: str = "") -> Iterator[str]:
    """Yield the paths of the keys whose values differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in [*one, *(name for name in other if name not in one)]:
            own = f"{key}.{name}" if key else str(name)
            yield from _different_keys(one.get(name), other.get(name), own)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from _different_keys(left, right, f"{key}[{i}]")
    elif one != other:
        yield key


def run_file_text(trial: Trial) -> str:
    """Return the run file, with a comment that shows how to start it by hand."""
    source = ""
    if trial.source is not None:
        runs = Path(trial.run["output"]).parent
        source = f" --from {quote(f'{runs / trial.source}@{trial.source_phase}')}"
    text = yaml.safe_dump(dict(trial.run), sort_keys=False, allow_unicode=True)
    return f"# megaphase train {trial.name}.yaml{source}\n{text}"
