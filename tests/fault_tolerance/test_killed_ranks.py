"""One rank of a job is killed: one line names it, whichever it is and whatever it was doing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from random import Random

import pytest
from data_support import LIMIT_SECONDS, wait_until
from killed_rank import OUTLOOK
from run_support import make_corpora, megaphase, run_settings, write_run_file

pytestmark = pytest.mark.distributed

RANK = Path(__file__).resolve().parents[1] / "support" / "killed_rank.py"
# While ranks join each other, only the launcher knows that one is dead.
PATIENCE_SECONDS = {"starting": 2.0, "training": 120.0}
LAUNCHER = """
import sys
from megaphase.launch.local import ExitMessages, run_as_ranks
processes, patience, *argv = sys.argv[1:]
exit_messages = ExitMessages(lambda: "It begins again")
sys.exit(run_as_ranks(argv, int(processes), exit_messages, patience_seconds=float(patience)))
"""


def kill(
    folder: Path, command: list[str], ranks: int, victim: int, moment: str, number: int, wait: float
) -> tuple[int, int, str]:
    """Start ranks, kill one `wait` seconds after a moment; return its pid, exit code and output."""
    with open(folder / "stderr", "wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        files = [folder / f"{moment}-{rank}" for rank in range(ranks)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        time.sleep(wait)
        pid = int(files[victim].read_text())
        os.kill(pid, number)
        return pid, process.wait(LIMIT_SECONDS), (folder / "stderr").read_text()
    finally:
        process.kill()
        process.wait()


def check_kill(
    folder: Path, ranks: int, victim: int, moment: str, number: signal.Signals, wait: float
) -> None:
    command = [sys.executable, "-c", LAUNCHER, ranks, PATIENCE_SECONDS[moment]]
    command += [sys.executable, RANK, folder]
    pid, code, said = kill(folder, [*map(str, command)], ranks, victim, moment, number, wait)
    assert code == 1
    name = rf"megaphase: rank {victim} (on \S+ )?\(process {pid}\) was killed by {number.name}"
    end = r"; all processes end\. It begins again"
    if moment == "training" and ranks > 1:
        end = rf", last seen [^;]*; all processes end\. {OUTLOOK}"
    assert re.fullmatch(rf"{name}{end}\n", said), said


@pytest.mark.parametrize(
    ("ranks", "victim", "moment", "number"),
    [
        (1, 0, "training", signal.SIGKILL),
        pytest.param(2, 0, "training", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, 1, "training", signal.SIGSEGV, marks=pytest.mark.slow),
        (4, 2, "training", signal.SIGKILL),
        (2, 1, "starting", signal.SIGKILL),
    ],
)
def test_killed_rank_is_named_in_one_line(ranks, victim, moment, number, tmp_path):
    check_kill(tmp_path, ranks, victim, moment, number, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(36))
def test_rank_killed_at_a_random_moment_is_named_in_one_line(seed, tmp_path):
    chance = Random(seed)
    ranks = chance.choice([1, 2, 4])
    moment = chance.choice(["starting", "training", "training"])
    number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGABRT])
    wait = chance.uniform(0, 0.2 if moment == "starting" else 1.0)
    check_kill(tmp_path, ranks, chance.randrange(ranks), moment, number, wait)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_rank_killed_below_torchrun_is_named_in_one_line(victim, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [str(RANK), str(tmp_path)]
    pid, code, said = kill(tmp_path, command, 2, victim, "training", signal.SIGKILL, 0.1)
    assert code == 1
    # The launcher's own report, including a traceback, cannot be changed by Megaphase.
    [line] = [line for line in said.splitlines() if line.startswith("megaphase: ")]
    assert f"rank {victim} on " in line
    assert f"(process {pid}) has ended without a word (killed, or out of memory)" in line
    assert line.endswith(f"all processes end. {OUTLOOK}")
    assert said.count("gloo") == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1, 0), (2, 2, 0), (2, 1, 3), (4, 2, 3)])
def test_killed_rank_of_a_training_is_named_in_one_line(layout, tmp_path):
    ranks, tensor, zero = layout
    parallel = {"tensor": tensor, "zero": zero}
    settings = run_settings(make_corpora(tmp_path / "corpora"), parallel=parallel)
    settings["phases"][0]["steps"] = 4000
    settings["checkpoint"]["every_steps"] = 50
    run_file = write_run_file(tmp_path, settings)
    chance = Random(ranks + 10 * tensor + 100 * zero)
    for start in range(4):
        victim = chance.randrange(ranks)
        stderr = tmp_path / "stderr"
        process = subprocess.Popen(
            megaphase("launch", "local", run_file, "--processes", ranks),
            stdout=subprocess.DEVNULL,
            stderr=stderr.open("wb"),
        )
        if start == 0:
            wait_until(partial(has_trained, tmp_path / "run" / "metrics.jsonl"))
        else:
            wait_until((tmp_path / f"run/checkpoints/step-{50 * start:08d}").exists)
        time.sleep(chance.uniform(0, 0.5))
        pid = rank_of(process.pid, victim)
        os.kill(pid, signal.SIGKILL)
        assert process.wait(LIMIT_SECONDS) == 1
        newest = max(tmp_path.glob("run/checkpoints/step-*"), default=None)
        line = stderr.read_text()
        assert line.startswith(f"megaphase: rank {victim} on "), line
        assert f" (process {pid}) was killed by SIGKILL, last seen " in line
        assert line.count("\n") == 1
        resume_point = "There is no checkpoint yet: the same command starts from the beginning"
        if newest is not None:
            resume_point = f"The same command resumes from {newest.name}"
        assert line.endswith(f"; all processes end. {resume_point}\n")


def has_trained(metrics: Path) -> bool:
    return metrics.exists() and b"loss_by_task" in metrics.read_bytes()


def rank_of(launcher: int, rank: int) -> int:
    """Return the process of a rank, among those that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = [
        int(child)
        for child in children
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes()
    ]
    assert len(found) == 1
    return found[0]
