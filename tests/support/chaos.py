"""Kill a real run at chosen and random moments, damage its checkpoints, and restart it.

Used by test_kills.py; run as a program, it is the soak test: `make soak`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from distributed import RunningRanks, check, launch
from run_support import make_corpora, megaphase, read_rows, run_settings, timeless, write_run_file

NEVER = "never"
MOMENTS = ["at any moment", "in a save", "after a save", "at the switch"]
POLL_SECONDS = 0.002
START_SECONDS = 300.0
STEPS = (36, 24)
Moment = Callable[[], bool]
Layout = tuple[int, int, int]  # processes, tensor, zero

LAYOUTS: list[Layout] = [
    (1, 1, 0), (1, 1, 3), (2, 1, 1), (2, 1, 3), (2, 2, 0), (2, 2, 3), (4, 2, 2), (4, 2, 3),
]  # fmt: skip


def chaos_settings(corpora: Path, layout: Layout, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run of two phases that saves all the time."""
    settings = run_settings(corpora, **changes)
    for phase, steps in zip(settings["phases"], STEPS, strict=True):
        phase["steps"] = steps
    settings |= {
        "parallel": {"tensor": layout[1], "zero": layout[2]},
        "checkpoint": {"every_steps": 2, "keep": 3},
        "monitor": {"tasks": ["cimri"]},
        "faults": {"silent_seconds": 20.0},
    }
    return settings


class Victim:
    """A run that is killed and restarted; counts the kills."""

    def __init__(self, run_file: Path, random: Random) -> None:
        self.run_file, self.folder, self._random = run_file, run_file.parent / "run", random
        self.counts: Counter[str] = Counter()

    def live(self, layout: Layout, moment: str) -> bool:
        """Start the run and kill it at a moment; return False if it ended before."""
        command = megaphase("train", self.run_file, *overrides(layout))
        with RunningRanks(command, layout[0]) as ranks:
            came = self._wait(ranks, self._moment(moment))
            if came:
                self._kill(ranks)
                self.counts[f"killed {moment}"] += 1
            else:
                check(ranks.wait())
            said = " ".join(ranks.result(0).stdout.split())
        self.counts["resumed"] += "resuming from" in said
        self.counts["damage found"] += "going back to the checkpoint before" in said
        return came

    def damage(self) -> None:
        """Damage the newest checkpoint, if there is an earlier one to fall back to."""
        whole = sorted((self.folder / "checkpoints").glob("step-*"))
        if len(whole) < 2:
            return
        files = sorted(path for path in whole[-1].iterdir() if path.stat().st_size)
        victim = self._random.choice(files)
        content = bytearray(victim.read_bytes())
        how = self._random.choice(["altered", "truncated", "removed"])
        if how == "removed":
            victim.unlink()
        else:
            place = self._random.randrange(len(content))
            if how == "altered":
                content[place] ^= 1 << self._random.randrange(8)
            victim.write_bytes(content if how == "altered" else content[:place])
        self.counts[f"checkpoints {how}"] += 1

    @property
    def kills(self) -> int:
        """The number of kills so far."""
        return sum(n for what, n in self.counts.items() if what.startswith("killed"))

    def _kill(self, ranks: RunningRanks) -> None:
        """Kill all ranks, or a single one, after which the others must end by themselves."""
        if len(ranks.processes) == 1 or self._random.random() < 0.7:
            ranks.signal(signal.SIGKILL)
            return
        self.counts["of these, a single rank"] += 1
        self._random.choice(ranks.processes).kill()
        deadline = time.monotonic() + START_SECONDS
        while any(process.poll() is None for process in ranks.processes):
            assert time.monotonic() < deadline, "a rank outlived a dead one"
            time.sleep(POLL_SECONDS)

    def _wait(self, ranks: RunningRanks, moments: Iterator[Moment]) -> bool:
        """Wait until all moments have come, one after the other; return False if the run ended
        before."""
        deadline = time.monotonic() + START_SECONDS
        for moment in moments:
            while not moment():
                if all(process.poll() is not None for process in ranks.processes):
                    return False
                assert time.monotonic() < deadline, "the moment never came"
                time.sleep(POLL_SECONDS)
        return any(process.poll() is None for process in ranks.processes)

    def _moment(self, name: str) -> Iterator[Moment]:
        rows = self._rows_written()
        yield lambda: self._rows_written() > rows  # training has started
        if name == "in a save":
            yield lambda: any((self.folder / "checkpoints").glob(".*.partial"))
        elif name == "after a save":
            names = {path.name for path in (self.folder / "checkpoints").glob("step-*")}
            yield lambda: bool(
                {path.name for path in (self.folder / "checkpoints").glob("step-*")} - names
            )
        elif name == "at the switch":
            yield lambda: b"phase_end" in self._metrics()
        elif name == NEVER:
            yield lambda: False
        seconds = self._random.random() * (1.5 if name == "at any moment" else 0.05)
        wake = time.monotonic() + seconds
        yield lambda: time.monotonic() >= wake

    def _metrics(self) -> bytes:
        path = self.folder / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    def _rows_written(self) -> int:
        return self._metrics().count(b'"step_seconds"')


def overrides(layout: Layout) -> list[str]:
    """Return the overrides that give a run file's run this layout."""
    return [f"parallel.tensor={layout[1]}", f"parallel.zero={layout[2]}"]


def reference(folder: Path, settings: dict[str, Any], layout: Layout) -> list[dict[str, Any]]:
    """Return the rows of the same run without interruptions."""
    run_file = write_run_file(folder, settings)
    check(launch(megaphase("train", run_file), layout[0], timeout=START_SECONDS))
    return timeless(read_rows(folder / "run"))


def largest_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Return the largest relative difference of two runs' losses; infinite if rows are missing."""
    if [(r["step"], r.get("event")) for r in one] != [(r["step"], r.get("event")) for r in other]:
        return float("inf")
    pairs = zip(one, other, strict=True)
    return max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs if "loss_by_task" in a)


def soak(folder: Path, minutes: float, seed: int) -> int:
    """Run repeatedly until the time is over; prints what happened. Returns 1 if a run went
    wrong."""
    random = Random(seed)
    corpora = make_corpora(folder / "corpora")
    layout = (2, 2, 3)
    settings = chaos_settings(corpora, layout)
    expected = reference(folder / "reference", settings, layout)
    ends = time.monotonic() + 60 * minutes
    total: Counter[str] = Counter()
    worst = 0.0
    while time.monotonic() < ends:
        number = total["runs"]
        victim = Victim(write_run_file(folder / f"run-{number}", settings), random)
        while victim.live(random.choice(LAYOUTS), random.choice(MOMENTS)):
            if random.random() < 0.3:
                victim.damage()
            print(f"run {number}: {json.dumps(victim.counts)}", flush=True)
        difference = largest_difference(timeless(read_rows(victim.folder)), expected)
        worst = max(worst, difference)
        total += victim.counts
        total["runs"] += 1
        print(f"run {number} is at its end; its losses differ by {difference:.1e}", flush=True)
    print(f"\nseed {seed}, {minutes:g} minutes")
    for what, n in sorted(total.items()):
        print(f"{what}: {n}")
    print(f"largest relative difference of a loss to the undisturbed run: {worst:.1e}")
    return int(worst > 1e-5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        sys.exit(soak(Path(scratch), arguments.minutes, arguments.seed))
