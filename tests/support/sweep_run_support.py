"""A small sweep on synthetic languages, and its runs on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from run_support import HIGH, LOW, run_settings
from warm_process import WarmProcess

from megaphase.launch.local import free_port, rank_environment
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.display import SweepDisplay
from megaphase.sweep.local import Machine, Start, run_locally
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.start import checked_sweep
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial

STEPS = 10


def settings(corpora: Path, **changes: Any) -> dict[str, Any]:
    """Return a sweep of two arms; `changes` replace top-level keys."""
    run = run_settings(corpora, checkpoint={"every_steps": 3, "keep": 1})
    run |= {"validation": {"every_steps": 2, "samples": 6, "fraction": 0.1}}
    return {
        "run": run,
        "output": "out",
        "high": list(HIGH),
        "low": list(LOW),
        "steps": STEPS,
        "learning_rate": {"peaks": [1e-2], "warmup": 0.2},
        "seeds": [11],
        "arms": {"static": {"rates": [0.2]}, "two-phase": {"pretrain": [0.6], "rates": [0.4]}},
        **changes,
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def open_sweep(path: Path) -> tuple[Sweep, SweepDirectory]:
    """Check a sweep file and prepare the sweep's directory, as a start of the sweep does."""
    found, directory = checked_sweep(path)
    with directory.locked():
        directory.prepare(found)
    return found, directory


def warm_start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> WarmProcess:
    """Start a command in a fork that has already imported torch and DeepSpeed."""
    env = {**environment, **rank_environment(0, 1, free_port())}
    del env["MEGAPHASE_PARENT"]  # its parent is the server of the forks
    return WarmProcess("megaphase.cli:main", list(command), stdout=log, stderr=log, env=env)


def quiet_display(sweep: Any) -> SweepDisplay:
    from rich.console import Console

    return SweepDisplay(Console(quiet=True), sweep, 0, 0)


def run_warm(
    path: Path, start: Start = warm_start
) -> tuple[Any, SweepDirectory, dict[str, Outcome]]:
    sweep, directory = open_sweep(path)
    machine = Machine(jobs=2, processes=1, gpus=0)
    with directory.locked():
        return sweep, directory, run_locally(
            sweep, directory, machine, quiet_display(sweep), start
        )  # fmt: skip


def invented(trial: Trial, best: float) -> Outcome:
    """Losses that are lowest for the peak `best`."""
    loss = 3.0 + abs(trial.peak - best)
    return Outcome(step=1, losses=dict.fromkeys([*HIGH, *LOW], loss))


def running(directory: SweepDirectory) -> set[str]:
    """Return the runs of this sweep to whose logs a process writes."""
    logs = directory.log("").parent
    found = set()
    for each in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):
            output = each.readlink()
            if output.parent == logs:
                found.add(output.stem)
    return found
