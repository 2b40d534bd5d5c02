"""SIGTERM, SIGUSR1 and Ctrl-C: all ranks finish the step, save and end with exit code 75.

One run of two processes is stopped at many moments and restarted each time; in the end its rows
must equal, bit for bit, those of its uninterrupted twin.
"""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from distributed import RunningRanks, check, launch
from run_support import (
    make_corpora,
    megaphase,
    read_rows,
    rows_so_far,
    run_settings,
    save_begins,
    timeless,
    write_run_file,
)
from warm_commands import signal_before

PROCESSES = 2
STEPS = (24, 12)
LINE = re.compile(
    r"megaphase: (SIG\w+|Ctrl-C) came to rank (\d): saved after step ([\d,]+); the same command "
    r"resumes from there\n"
)
SAVING = "megaphase: saving after this step; press Ctrl-C again to end at once\n"
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
Signals = Sequence[tuple[int, signal.Signals]]  # to which rank


@dataclass(frozen=True)
class Stop:
    """A start of the run that was stopped, and the files it left."""

    results: list[subprocess.CompletedProcess[str]]
    checkpoints: list[str]
    latest: str
    steps: int  # training rows

    @property
    def codes(self) -> list[int]:
        return [result.returncode for result in self.results]

    def said(self) -> tuple[str, int, int]:
        """Return signal, rank and step, from the only line on standard error; two lines after
        Ctrl-C."""
        assert [result.stderr for result in self.results[1:]] == [""] * (len(self.results) - 1)
        match = LINE.fullmatch(self.results[0].stderr.removeprefix(SAVING))
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
            ranks.wait_for(partial(moment, ranks))
            for rank, number in signals:
                ranks.processes[rank].send_signal(number)
            return self._what_came_of_it(ranks)

    def stop_itself(self, method: str, rank: int, number: signal.Signals, calls: int = 1) -> Stop:
        """Send a rank the signal at a certain call of a method of its training loop."""
        prepare = partial(signal_at_call, method, calls, rank, number)
        with RunningRanks(self.command, PROCESSES, prepare=prepare) as ranks:
            return self._what_came_of_it(ranks)

    def _what_came_of_it(self, ranks: RunningRanks) -> Stop:
        results = ranks.wait()
        checkpoints = self._run / "checkpoints"
        names = sorted(path.name for path in checkpoints.glob("*"))
        latest = (checkpoints / "latest").resolve().name
        return Stop(results, names, latest, len(self._rows()))

    def after_steps(self, steps: int) -> Callable[[RunningRanks], bool]:
        """Return a condition: this many more steps than there are now."""
        wanted = len(self._rows()) + steps
        return lambda ranks: len(self._rows()) >= wanted

    def saving(self) -> Callable[[RunningRanks], bool]:
        begun = save_begins(self._run / "checkpoints")
        return lambda ranks: begun()

    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in rows_so_far(self._run) if "loss_by_task" in row]


def signal_at_call(method: str, calls: int, rank: int, number: signal.Signals) -> None:
    """In the processes of a run: see `Stopper.stop_itself`."""
    count = itertools.count(1)
    signal_before(method, rank, number, lambda *_: next(count) == calls)


def starting_up(ranks: RunningRanks) -> bool:
    """Return whether all ranks have installed their handlers, long before the first step."""
    return all(_catches(each.pid, TERM) for each in ranks.processes)


def _catches(pid: int, number: signal.Signals) -> bool:
    status = Path("/proc", str(pid), "status").read_text()
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run file of the run that is not stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = run_settings(
        make_corpora(folder / "corpora"), parallel={"tensor": 2, "zero": 3}, seed=12
    )
    for phase, steps in zip(settings["phases"], STEPS, strict=True):
        phase["steps"] = steps
    run_file = write_run_file(folder, settings)
    check(launch(megaphase("train", run_file), PROCESSES))
    return run_file


@pytest.fixture(scope="module")
def story(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    run_file = tmp_path_factory.mktemp("stopped") / "run.yaml"
    run_file.write_text(undisturbed.read_text())
    run = Stopper(run_file)
    # Not one of the warm processes: its imports must not be done already.
    cold = ["env", sys.executable, *run.command[1:]]
    both = [(rank, number) for number in (TERM, USR1) for rank in (1, 0)]
    stops = {
        "at the start": run.stop(starting_up, [(0, TERM), (1, TERM)], cold),
        "before the first step": run.stop_itself("begin_phase", 1, TERM),
        "one rank": run.stop_itself("train_step", 1, TERM, calls=3),
        "again and again": run.stop(run.saving(), both * 5),
        "at the switch": run.stop_itself("end_phase", 1, USR1),
        "Ctrl-C": run.stop(run.after_steps(1), [(0, INT), (1, INT)]),
        "at the end": run.stop_itself("end_phase", 1, TERM),
    }
    return Story(run_file.parent / "run", undisturbed.parent / "run", stops)


@pytest.fixture(scope="module")
def launched_story(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Signals to the launcher, and to rank 0 alone."""
    run_file = tmp_path_factory.mktemp("launched") / "run.yaml"
    run_file.write_text(undisturbed.read_text())
    run = Stopper(run_file)
    local = megaphase("launch", "local", run_file, "--processes", PROCESSES)
    stops = {
        "the other rank": run.stop_itself("train_step", 0, USR1, calls=3),
        "launcher": run.stop(run.after_steps(1), [(0, TERM)], local, processes=1),
        "Ctrl-C to the launcher": run.stop(run.after_steps(1), [(0, INT)], local, processes=1),
        "at the end": run.stop(lambda ranks: True, []),
    }
    return Story(run_file.parent / "run", undisturbed.parent / "run", stops)


def check_stop(stop: Stop, signals: set[str], ranks: set[int]) -> None:
    assert set(stop.codes) == {75}, stop.results[0].stderr
    number, rank, step = stop.said()
    assert number in signals
    assert rank in ranks
    assert stop.latest == f"step-{step:08d}"
    assert stop.steps == step
    assert not [each for each in stop.checkpoints if each.startswith(".")]


def check_end(story: Story) -> None:
    """The run ended, like its twin that was not stopped."""

    def rows(run: Path) -> list[dict[str, Any]]:
        return [row for row in timeless(read_rows(run)) if row.get("event") != "stopped"]

    stop = story.stops["at the end"]
    assert stop.codes == [0, 0]
    assert stop.latest == f"step-{sum(STEPS):08d}"
    assert rows(story.run) == rows(story.undisturbed)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "signals", "ranks"),
    [
        ("one rank", {"SIGTERM"}, {1}),
        ("again and again", {"SIGTERM", "SIGUSR1"}, {0, 1}),
        ("at the switch", {"SIGUSR1"}, {1}),
        ("Ctrl-C", {"Ctrl-C"}, {0, 1}),
    ],
)
def test_a_signal_saves_and_ends_all_ranks(
    name: str, signals: set[str], ranks: set[int], story: Story
) -> None:
    check_stop(story.stops[name], signals, ranks)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_to_the_launcher_saves_and_ends_all_ranks(launched_story: Story) -> None:
    stops = launched_story.stops
    check_stop(stops["the other rank"], {"SIGUSR1"}, {0})
    check_stop(stops["launcher"], {"SIGTERM"}, {0, 1})
    check_stop(stops["Ctrl-C to the launcher"], {"Ctrl-C"}, {0, 1})
    assert stops["Ctrl-C to the launcher"].results[0].stderr.startswith(SAVING)
    check_end(launched_story)


@pytest.mark.distributed
def test_a_signal_at_the_start_ends_a_run_that_has_nothing_to_save(story: Story) -> None:
    stop = story.stops["at the start"]
    assert stop.codes == [75, 75]
    assert re.fullmatch(r"megaphase: SIGTERM came .*; nothing is lost\n", stop.results[0].stderr)
    assert stop.results[1].stderr == ""
    assert (stop.checkpoints, stop.steps) == ([], 0)


@pytest.mark.distributed
def test_a_signal_before_the_first_step_waits_for_no_validation(story: Story) -> None:
    stop = story.stops["before the first step"]
    assert stop.codes == [75, 75]
    assert stop.results[0].stderr == (
        "megaphase: SIGTERM came to rank 1 before the first step: nothing is lost, the same "
        "command starts again\n"
    )


@pytest.mark.distributed
def test_ctrl_c_says_at_once_that_the_run_saves(story: Story) -> None:
    assert story.stops["Ctrl-C"].results[0].stderr.startswith(SAVING)


@pytest.mark.distributed
def test_a_signal_at_the_switch_waits_for_a_step_of_the_next_phase(story: Story) -> None:
    assert story.stops["at the switch"].said()[2] == STEPS[0] + 1


@pytest.mark.distributed
def test_a_run_that_was_stopped_ends_like_its_twin(story: Story) -> None:
    check_end(story)
