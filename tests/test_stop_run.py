"""SIGTERM and SIGUSR1: all ranks finish the step, save and end with exit code 75.

One run of two processes is stopped at moment after moment and started again each time; in the end
its rows must equal, bit for bit, those of its undisturbed twin.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from distributed import RunningRanks, check, launch
from run_support import (
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)

PROCESSES = 2
STEPS = (24, 12)
TIMEOUT_SECONDS = 400.0
LINE = re.compile(
    r"megaphase: (SIG\w+) came to rank (\d): saved after step ([\d,]+); the same command goes on "
    r"from there\n"
)
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1
Signals = Sequence[tuple[int, signal.Signals]]  # to which rank


@dataclass(frozen=True)
class Stop:
    """A start of the run that was stopped, and what it left behind."""

    results: list[subprocess.CompletedProcess[str]]
    checkpoints: list[str]
    latest: str
    steps: int  # training rows

    @property
    def codes(self) -> list[int]:
        return [result.returncode for result in self.results]

    def said(self) -> tuple[str, int, int]:
        """Signal, rank and step, from the only line on standard error."""
        assert [result.stderr for result in self.results[1:]] == [""] * (len(self.results) - 1)
        match = LINE.fullmatch(self.results[0].stderr)
        assert match is not None, self.results[0].stderr
        return match[1], int(match[2]), int(match[3])


@dataclass(frozen=True)
class Story:
    run: Path
    undisturbed: Path
    stops: dict[str, Stop]


class Stopper:
    """Starts a run, sends signals at a moment, and waits for the end."""

    def __init__(self, run_file: Path) -> None:
        self._run_file, self._run = run_file, run_file.parent / "run"
        self.command = megaphase("train", run_file)

    def stop(
        self,
        moment: Callable[[RunningRanks], bool],
        signals: Signals,
        command: list[str] | None = None,
        processes: int = PROCESSES,
    ) -> Stop:
        with RunningRanks(command or self.command, processes) as ranks:
            self._wait(ranks, moment)
            for rank, number in signals:
                ranks.processes[rank].send_signal(number)
            results = ranks.wait(TIMEOUT_SECONDS)
        checkpoints = self._run / "checkpoints"
        names = sorted(path.name for path in checkpoints.iterdir())
        latest = (checkpoints / "latest").resolve().name
        return Stop(results, names, latest, len(self._rows()))

    def _wait(self, ranks: RunningRanks, moment: Callable[[RunningRanks], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not moment(ranks):
            ended = [rank for rank, each in enumerate(ranks.processes) if each.poll() is not None]
            assert not ended, ranks.result(ended[0]).stderr
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(0.001)

    def after_steps(self, steps: int) -> Callable[[RunningRanks], bool]:
        """So many more than there are now."""
        wanted = len(self._rows()) + steps
        return lambda ranks: len(self._rows()) >= wanted

    def at_end_of(self, phase: str) -> Callable[[RunningRanks], bool]:
        needle = f'"event": "phase_end", "phase": "{phase}"'
        return lambda ranks: needle in self._metrics()

    def saving(self, ranks: RunningRanks) -> bool:
        return any((self._run / "checkpoints").glob(".step-*.partial"))

    def _metrics(self) -> str:
        path = self._run / "metrics.jsonl"
        return path.read_text() if path.exists() else ""

    def _rows(self) -> list[dict[str, Any]]:
        whole = [line for line in self._metrics().splitlines(keepends=True) if line.endswith("\n")]
        return [row for row in map(json.loads, whole) if "loss_by_task" in row]


def starting_up(ranks: RunningRanks) -> bool:
    """All ranks have installed their handlers, long before the first step."""
    return all(_catches(each.pid, TERM) for each in ranks.processes)


def _catches(pid: int, number: signal.Signals) -> bool:
    status = Path("/proc", str(pid), "status").read_text()
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("stopped")
    settings = run_settings(
        make_corpora(folder / "corpora"), parallel={"tensor": 2, "zero": 3}, seed=12
    )
    for phase, steps in zip(settings["phases"], STEPS, strict=True):
        phase["steps"] = steps
    undisturbed = write_run_file(folder / "undisturbed", settings)
    check(launch(megaphase("train", undisturbed), PROCESSES, timeout=TIMEOUT_SECONDS))
    run_file = write_run_file(folder / "stopped", settings)
    run = Stopper(run_file)
    # Not one of the warm processes: its imports must not be done already.
    cold = ["env", sys.executable, *run.command[1:]]
    local = megaphase("launch", "local", run_file, "--processes", PROCESSES)
    both = [(rank, number) for number in (TERM, USR1) for rank in (1, 0)]
    stops = {
        "at the start": run.stop(starting_up, [(0, TERM), (1, TERM)], cold),
        "one rank": run.stop(run.after_steps(2), [(1, TERM)]),
        "the other rank": run.stop(run.after_steps(2), [(0, USR1)]),
        "again and again": run.stop(run.saving, both * 5),
        "at the switch": run.stop(run.at_end_of("pretrain"), [(1, USR1)]),
        "launcher": run.stop(run.after_steps(1), [(0, TERM)], local, processes=1),
        "at the end": run.stop(run.at_end_of("joint"), [(1, TERM)]),
    }
    return Story(run_file.parent / "run", undisturbed.parent / "run", stops)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "signals", "ranks"),
    [
        ("at the start", {"SIGTERM"}, {0}),
        ("one rank", {"SIGTERM"}, {1}),
        ("the other rank", {"SIGUSR1"}, {0}),
        ("again and again", {"SIGTERM", "SIGUSR1"}, {0, 1}),
        ("at the switch", {"SIGUSR1"}, {1}),
        ("launcher", {"SIGTERM"}, {0, 1}),
    ],
)
def test_a_signal_saves_and_ends_all_ranks(
    name: str, signals: set[str], ranks: set[int], story: Story
) -> None:
    stop = story.stops[name]
    assert set(stop.codes) == {75}, stop.results[0].stderr
    number, rank, step = stop.said()
    assert number in signals
    assert rank in ranks
    assert stop.latest == f"step-{step:08d}"
    assert stop.steps == step
    assert not [each for each in stop.checkpoints if each.startswith(".")]


@pytest.mark.distributed
def test_a_signal_at_the_start_waits_for_one_step(story: Story) -> None:
    assert story.stops["at the start"].said() == ("SIGTERM", 0, 1)


@pytest.mark.distributed
def test_a_signal_at_the_switch_waits_for_a_step_of_the_next_phase(story: Story) -> None:
    assert story.stops["at the switch"].said()[2] == STEPS[0] + 1


@pytest.mark.distributed
def test_a_signal_at_the_last_step_lets_the_run_end(story: Story) -> None:
    stop = story.stops["at the end"]
    assert stop.codes == [0, 0]
    assert stop.latest == f"step-{sum(STEPS):08d}"


@pytest.mark.distributed
def test_a_run_that_was_stopped_ends_like_its_twin(story: Story) -> None:
    def rows(run: Path) -> list[dict[str, Any]]:
        return [row for row in timeless(read_rows(run)) if row.get("event") != "stopped"]

    assert rows(story.run) == rows(story.undisturbed)
