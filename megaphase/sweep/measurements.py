"""What is measured after a run of a sweep has spent the budget: losses on the test split and on
training documents, scores of translations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megaphase.launch.slurm.job_file import EVALUATION_FILE, TRANSLATION_FILE
from megaphase.report.load_run import load_run
from megaphase.report.measured import Measured
from megaphase.sweep.directory import GIVE_AGAIN, SweepDirectory
from megaphase.sweep.outcome import Outcome, Translated, outcome_of
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial
from megaphase.utils.errors import RunError
from megaphase.utils.json_models import read_record


class _MeasuredLoss(BaseModel):
    loss: Measured
    bits_per_byte: Measured


class _MeasuredLosses(BaseModel):
    """The results of `megaphase evaluate`, by task; a split that was not measured is empty."""

    step: int
    test: dict[str, _MeasuredLoss] = {}
    training: dict[str, _MeasuredLoss] = {}

    def of_split(self, split: str) -> Mapping[str, _MeasuredLoss]:
        return {"test": self.test, "training": self.training}[split]


class _MeasuredScores(BaseModel):
    """The results of `megaphase translate`."""

    translation: dict[str, Translated]


def _evaluate_arguments(sweep: Sweep, trial: Trial, run_file: Path, losses: Path) -> list[str]:
    """Return the arguments of `megaphase` that write a run's losses into `losses`."""
    splits = [
        f"--{option}={value}"
        for split, samples in _measured_splits(sweep).items()
        for option, value in (("split", split), ("samples", samples))
    ]
    return [
        # One process measures.
        *("evaluate", str(run_file), "parallel.tensor=1", *_weights_that_count(trial)),
        *("--out", str(losses), *splits),
    ]


def _translate_arguments(sweep: Sweep, trial: Trial, run_file: Path, scores: Path) -> list[str]:
    """Return the arguments of `megaphase` that score a run's translations into `scores`."""
    assert sweep.config.translation is not None
    options = sweep.config.translation.model_dump()
    split = [] if sweep.test_samples is None else ["--split=test"]
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    weights = _weights_that_count(trial)
    return ["translate", str(run_file), *weights, "--scores", str(scores), *split, *flags]


def _weights_that_count(trial: Trial) -> list[str]:
    """Return the options that name the weights by which a run is judged."""
    # By the name of its last phase, which fails for a run that has not ended.
    checkpoint = "best-mean" if trial.takes_best else last_phase(trial)
    return ["--checkpoint", checkpoint, *(["--average"] if trial.takes_average else [])]


def _measured_splits(sweep: Sweep) -> dict[str, int]:
    """Return the splits that are measured after training, and the samples of each."""
    training = sweep.config.training_loss
    splits = {
        "test": sweep.test_samples,
        "training": None if training is None else training.samples,
    }
    return {split: samples for split, samples in splits.items() if samples is not None}


@dataclass(frozen=True)
class Measurement:
    """A command that measures a run which has spent the budget, after its training.

    Attributes:
        name: of the command.
        job_file: with the record of its job on a cluster, in the run directory.
        result: returns the file that it writes, by the run's name.
        arguments: returns those of `megaphase`, for a run file and that file.
    """

    name: str
    job_file: str
    result: Callable[[SweepDirectory, str], Path]
    arguments: Callable[[Sweep, Trial, Path, Path], list[str]]


EVALUATION = Measurement(
    "evaluate", EVALUATION_FILE, SweepDirectory.losses_file, _evaluate_arguments
)
TRANSLATION = Measurement(
    "translate", TRANSLATION_FILE, SweepDirectory.scores_file, _translate_arguments
)


def measurements(sweep: Sweep, trial: Trial) -> list[Measurement]:
    """Return what is measured after a run has ended, in this order."""
    if not trial.is_final:
        return []
    evaluation = [EVALUATION] if _measured_splits(sweep) else []
    return evaluation + ([TRANSLATION] if sweep.config.translation is not None else [])


def is_measured(
    sweep: Sweep, directory: SweepDirectory, trial: Trial, measurement: Measurement
) -> bool:
    """Return whether a measurement of a run that has ended is complete."""
    file = measurement.result(directory, trial.name)
    if measurement is not EVALUATION or not file.exists():
        return file.exists()
    losses = read_record(file, _MeasuredLosses, GIVE_AGAIN)
    return _is_complete(sweep, losses, _trained(sweep, directory, trial).step)


def _is_complete(sweep: Sweep, losses: _MeasuredLosses, step: int) -> bool:
    """Return whether these are the losses of that step on all splits that the sweep file names,
    which may be others than when they were written."""
    splits = (losses.of_split(split) for split in _measured_splits(sweep))
    tasks = {*sweep.high, *sweep.low}
    return losses.step == step and all(tasks <= split.keys() for split in splits)


def _trained(sweep: Sweep, directory: SweepDirectory, trial: Trial) -> Outcome:
    """Return the outcome of a run's training alone."""
    run = load_run(directory.run(trial.name))
    best_of = sweep.low if trial.takes_best else None
    return outcome_of(run, best_of, of_average=trial.takes_average)


def read_outcome(sweep: Sweep, directory: SweepDirectory, trial: Trial) -> Outcome:
    """Return the outcome of a run that has ended, normally or because it diverged.

    Raises:
        InputError: a file of results is damaged.
        RunError: it is not measured at the step whose weights count.
    """
    outcome = _trained(sweep, directory, trial)
    if outcome.diverged is not None:
        return outcome
    for measurement in measurements(sweep, trial):
        file = measurement.result(directory, trial.name)
        if not file.exists():
            raise RunError(f"{file}: has not been written")
        if measurement is EVALUATION:
            losses = read_record(file, _MeasuredLosses, GIVE_AGAIN)
            if not _is_complete(sweep, losses, outcome.step):
                raise RunError(
                    f"{file}: has no results of step {outcome.step:,}, with which "
                    f"{directory.metrics(trial.name)} ends"
                )
            outcome = outcome.model_copy(update=_fields(losses))
        else:
            scores = read_record(file, _MeasuredScores, GIVE_AGAIN)
            outcome = outcome.model_copy(update={"translation": scores.translation})
    return outcome


def _fields(losses: _MeasuredLosses) -> dict[str, Any]:
    """Return the fields of an outcome that are in the results of `megaphase evaluate`."""
    fields = {
        split: {task: each.loss for task, each in found.items()}
        for split in ("test", "training")
        if (found := losses.of_split(split))
    }
    if losses.test:
        fields["test_bits_per_byte"] = {
            task: each.bits_per_byte for task, each in losses.test.items()
        }
    return fields


def last_phase(trial: Trial) -> str:
    """Return the name of the phase that a run trains."""
    return str(trial.run["phases"][-1]["name"])
