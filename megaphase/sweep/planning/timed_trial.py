"""Measure what runs of a sweep cost on this machine, by short runs in a temporary directory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.local import Machine, Process, Start, starter
from megaphase.sweep.measurements import TRANSLATION, Measurement, measurements
from megaphase.sweep.planning.work import Costs, shape_of
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trial_run import last_line, train_arguments
from megaphase.sweep.trials import Trial
from megaphase.utils.errors import RunError
from megaphase.utils.metrics_rows import rows_from_end
from megaphase.utils.run_files import METRICS_FILE

STEPS, SKIPPED = 10, 3  # steps of a trial; of these, first ones that are not counted
TRANSLATED = 8  # samples of a task
POLL_SECONDS = 0.02


def timed_costs(
    sweep: Sweep,
    trials: Sequence[Trial],
    machine: Machine,
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, Costs]:
    """Return the costs of runs by `shape_of`, each measured with as many runs at a time as the
    sweep would train.

    say: called with a line about each trial before it begins.

    Raises:
        RunError: a trial has failed.
    """
    found: dict[str, Costs] = {}
    with TemporaryDirectory(prefix="megaphase-trial-") as folder, starter(sweep, machine) as start:
        # What only the first command of a sweep waits for is not to be counted for each.
        start(["--version"], Path(folder, "log"), machine.environment(0)).wait()
        for trial in sorted(trials, key=lambda trial: not trial.is_final):
            shape = shape_of(trial)
            if shape not in found:
                say(f"timing {trial.name}: {STEPS} steps, and what is measured after a run")
                own = Path(folder, str(len(found)))
                own.mkdir()
                found[shape] = _timed(sweep, trial, machine, own, start)
    return found


def _timed(sweep: Sweep, trial: Trial, machine: Machine, folder: Path, start: Start) -> Costs:
    copies = [
        _Copy(sweep, trial, machine.environment(slot), folder / str(slot), start, machine.processes)
        for slot in range(machine.jobs)
    ]
    _wait_for(copies, "train")
    steps = [copy.step_seconds for copy in copies]
    validations = [copy.validation_seconds for copy in copies]
    starts = [copy.start_seconds for copy in copies]
    measuring = 0.0
    for measurement in measurements(sweep, trial):
        for copy in copies:
            copy.measure(measurement)
        _wait_for(copies, measurement.name)
        measuring += fmean(copy.measuring_seconds(measurement, fmean(starts)) for copy in copies)
    return Costs(fmean(steps), fmean(validations), fmean(starts), measuring)


def _wait_for(copies: Sequence[_Copy], what: str) -> None:
    """Wait until all have ended; all are killed if one fails, or on Ctrl-C."""
    try:
        running = list(copies)
        while running:
            time.sleep(POLL_SECONDS)
            running = [copy for copy in running if not copy.has_ended()]
    finally:
        for copy in copies:
            copy.kill()
    for copy in copies:
        if (code := copy.process.wait()) != 0:
            reason = last_line(copy.log) or f"exit code {code}"
            raise RunError(f"the trial of {copy.trial.name} failed to {what}: {reason}")


@dataclass
class _Moments:
    """Seconds from the start of the command to the first validation, the last step, the last
    validation, and the end."""

    first_validation: float = 0.0
    last_step: float = 0.0
    last_validation: float = 0.0
    end: float = 0.0


class _Copy:
    """One of the runs that are timed at the same time."""

    process: Process

    def __init__(
        self,
        sweep: Sweep,
        trial: Trial,
        environment: Mapping[str, str],
        folder: Path,
        start: Start,
        processes: int,
    ) -> None:
        folder.mkdir()
        self.trial, self.log = trial, folder / "log"
        self._sweep, self._folder = sweep, folder
        self._start, self._environment = start, environment
        self._run_file = folder / "run.yaml"
        run = trial_run(trial.run, folder / "run")
        self._run_file.write_text(yaml.safe_dump(run, sort_keys=False))
        self._samples = 0 if sweep.config.translation is None else sweep.config.translation.samples
        directory = SweepDirectory(folder)
        without_source = _without_source(trial)
        arguments = train_arguments(directory, without_source, self._run_file, processes)
        self.moments = _Moments()
        self._begin(arguments)

    def _begin(self, arguments: Sequence[str]) -> None:
        self._began = time.monotonic()
        self.process = self._start(arguments, self.log, self._environment)

    def kill(self) -> None:
        """Kill the command and the processes that it has started, if it has not ended."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def measure(self, measurement: Measurement) -> None:
        """Measure the weights of the trial; a translation is of a few samples."""
        sweep, trial = self._sweep, _without_source(self.trial)
        if measurement is TRANSLATION and (translation := sweep.config.translation) is not None:
            few = translation.model_copy(update={"samples": self._translated})
            config = sweep.config.model_copy(update={"translation": few})
            sweep = sweep.model_copy(update={"config": config})
        result = self._folder / f"{measurement.name}.json"
        self.moments = _Moments()
        self._begin(measurement.arguments(sweep, trial, self._run_file, result))

    def has_ended(self) -> bool:
        """Return whether the command has ended; notes what it has reached since the last call."""
        code, now, moments = self.process.poll(), time.monotonic() - self._began, self.moments
        metrics = self._folder / "run" / METRICS_FILE
        rows = list(rows_from_end(metrics)) if metrics.exists() else []
        validations = [row["step"] for row in rows if "validation" in row]
        reached = {
            "first_validation": bool(validations),
            "last_step": any("loss" in row and row["step"] == STEPS for row in rows),
            "last_validation": STEPS in validations,
            "end": code is not None,
        }
        for name, is_reached in reached.items():
            if is_reached and not getattr(moments, name):
                setattr(moments, name, now)
        return code is not None

    @property
    def step_seconds(self) -> float:
        rows = (self._folder / "run" / METRICS_FILE).read_text().splitlines()
        found = [row["step_seconds"] for row in map(json.loads, rows) if "step_seconds" in row]
        return fmean(found[SKIPPED:])

    @property
    def validation_seconds(self) -> float:
        return max(0.0, self.moments.last_validation - self.moments.last_step)

    @property
    def start_seconds(self) -> float:
        """Seconds before the first validation and after the last one."""
        before = self.moments.first_validation - self.validation_seconds
        return max(0.0, before) + self.moments.end - self.moments.last_validation

    @property
    def _translated(self) -> int:
        return min(self._samples, TRANSLATED)

    def measuring_seconds(self, measurement: Measurement, start: float) -> float:
        """Seconds of the newest measurement with all samples, of which `start` do not depend on
        their number."""
        if measurement is not TRANSLATION:
            return self.moments.end
        return start + max(0.0, self.moments.end - start) * self._samples / self._translated


def trial_run(run: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Return a run of a few steps with the same sizes, that starts from initial weights."""
    phase = run["phases"][0]
    kept = {key: phase[key] for key in ("model", "batch", "cut", "mixture") if key in phase}
    rate = {"schedule": "constant", "peak": phase["learning_rate"]["peak"], "warmup_steps": 0}
    content = deepcopy({key: value for key, value in run.items() if key != "monitor"})
    content |= {"output": str(output)}
    # No uploads and no trackers, where what it leaves behind would be taken for the run's own.
    content.get("checkpoint", {}).pop("upload", None)
    content.pop("logging", None)
    content["validation"] = {**content.get("validation", {}), "every_steps": 10 * STEPS}
    content["phases"] = [
        {"name": phase["name"], "steps": STEPS, **deepcopy(kept), "learning_rate": rate}
    ]
    return content


def _without_source(trial: Trial) -> Trial:
    return replace(trial, source=None, source_phase=None, takes_best=False, takes_average=False)
