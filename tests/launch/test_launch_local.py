"""`megaphase launch local` forwards signals to all ranks, returns exit codes, and leaves no
rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from data_support import LIMIT_SECONDS, is_running, wait_until

PATIENCE_SECONDS = 1.0
# A surviving rank has this long to record that it is told to end.
GRACE_SECONDS = 5.0

# `code` runs with the rank's number; a file records that the rank has started.
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
received = []
signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
def wait():
    (folder / f"ready-{rank}").write_text(str(os.getpid()))
    time.sleep(600)
def note(number, frame):
    received.append(signal.Signals(number).name)
    (folder / f"signals-{rank}").write_text(" ".join(received))
def take_signals():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # as the program does when it can
def note_signals():
    for number in signals:
        signal.signal(number, note)
    take_signals()
def report(rank, line):
    from megaphase.distributed.dist_env import report_end
    assert report_end(rank, [line])
def wait_for(what, seconds=300):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)
"""

LAUNCHER = """
import sys
from megaphase.launch.local import ExitMessages, run_as_ranks
processes, patience, grace, *argv = sys.argv[1:]
seconds = {"patience_seconds": float(patience), "grace_seconds": float(grace)}
exit_messages = ExitMessages(lambda: "It resumes from step-00000004", lambda: "7 steps are lost")
sys.exit(run_as_ranks(argv, int(processes), exit_messages, **seconds))
"""


class Launched:
    """A running launcher whose ranks run a piece of Python."""

    def __init__(self, folder: Path, code: str, processes: int, patience: float) -> None:
        self.folder, self._processes = folder, processes
        script = folder / "rank.py"
        script.write_text(PRELUDE + code)
        argv = [sys.executable, "-c", LAUNCHER, processes, patience, GRACE_SECONDS]
        argv += [sys.executable, script, folder]
        self.process = subprocess.Popen(
            [str(each) for each in argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def pids(self) -> list[int]:
        """The ranks' processes, once all of them wait."""
        found = [self.folder / f"ready-{rank}" for rank in range(self._processes)]
        wait_until(lambda: all(path.exists() and path.read_text() for path in found))
        return [int(path.read_text()) for path in found]

    def signals(self) -> list[str]:
        """The signals that each rank has received."""
        found = [self.folder / f"signals-{rank}" for rank in range(self._processes)]
        return [path.read_text() if path.exists() else "" for path in found]

    def has_signals(self, count: int) -> bool:
        """Return whether every rank has received `count` signals."""
        return all(len(each.split()) == count for each in self.signals())

    def result(self) -> tuple[int, str]:
        """Wait for the end; return exit code and standard error."""
        _, stderr = self.process.communicate(timeout=LIMIT_SECONDS)
        return self.process.returncode, stderr


@contextmanager
def launched(
    folder: Path, code: str, processes: int = 2, patience: float = PATIENCE_SECONDS
) -> Iterator[Launched]:
    job = Launched(folder, code, processes, patience)
    try:
        yield job
    finally:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
        for pipe in (job.process.stdout, job.process.stderr):
            pipe.close()


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0, 0), 0), ((1, 2, 1), 2), ((1, 0, 75), 1), ((75, 75, 75), 75), ((130, 0, 75), 130)],
)
def test_most_telling_exit_code(codes, expected, tmp_path):
    with launched(tmp_path, f"sys.exit({codes}[rank])", 3, patience=30) as job:
        assert job.result() == (expected, "")


@pytest.mark.parametrize(("codes", "expected"), [((0, 7, 0), 7), ((0, 7, 1), 1)])
def test_rank_that_ends_with_a_code_of_no_meaning_is_named(codes, expected, tmp_path):
    with launched(tmp_path, f"sys.exit({codes}[rank])", 3, patience=30) as job:
        code, stderr = job.result()
    assert code == expected
    assert re.fullmatch(
        r"megaphase: rank 1 \(process \d+\) ended with exit code 7; all processes end\. It resumes "
        r"from step-00000004\n",
        stderr,
    )


def test_every_signal_reaches_every_rank(tmp_path):
    code = """
note_signals()
(folder / f"ready-{rank}").write_text(str(os.getpid()))
wait_for(lambda: len(received) == 3)
sys.exit(75)
"""
    with launched(tmp_path, code) as job:
        job.pids()
        for count, number in enumerate((signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM), start=1):
            job.process.send_signal(number)
            wait_until(partial(job.has_signals, count))
        assert job.result() == (75, "")
        assert job.signals() == ["SIGUSR1 SIGTERM SIGTERM"] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_forwarded_signal_that_kills_is_not_reported(number, tmp_path):
    with launched(tmp_path, "take_signals(); wait()") as job:
        job.pids()
        job.process.send_signal(number)
        assert job.result() == (75, "")


def test_signals_wait_for_ranks_that_are_just_being_started(tmp_path):
    code = """
(folder / f"ready-{rank}").write_text(str(os.getpid()))
wait_for(lambda: signal.SIGTERM in signal.sigpending())
note_signals()
wait_for(lambda: received)
sys.exit(75)
"""
    with launched(tmp_path, code) as job:
        job.pids()
        job.process.send_signal(signal.SIGTERM)
        assert job.result() == (75, "")
        assert job.signals() == ["SIGTERM"] * 2


def killed(number, name, pid):
    return (
        f"megaphase: rank {number} (process {pid}) was killed by {name}; all processes end. It "
        "resumes from step-00000004\n"
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_rank_killed_from_outside_is_named(number, tmp_path):
    with launched(tmp_path, "take_signals(); wait()", 3) as job:
        pids = job.pids()
        os.kill(pids[1], number)
        code, stderr = job.result()
    assert (code, stderr) == (1, killed(1, number.name, pids[1]))
    assert not any(map(is_there, pids))


def test_rank_that_aborts_after_another_was_killed_is_not_blamed(tmp_path):
    code = """
if rank == 1:
    wait()
import signal
wait_for((folder / "ready-1").exists)
wait_for((folder / "ready-1").read_text)
(folder / f"ready-{rank}").write_text(str(os.getpid()))
victim = int((folder / "ready-1").read_text())
os.kill(os.getppid(), signal.SIGSTOP)  # so that the launcher finds both at once
os.kill(victim, signal.SIGKILL)
os.system(f"(sleep 1; kill -CONT {os.getppid()}) &")
os.abort()
"""
    with launched(tmp_path, code, 2, patience=30) as job:
        pids = job.pids()
        assert job.result() == (1, killed(1, "SIGKILL", pids[1]))


def test_others_may_tell_more_than_the_launcher(tmp_path):
    code = """
if rank == 0:
    wait()
wait_for((folder / "ready-0").exists)
wait_for((folder / "ready-0").read_text)
victim = int((folder / "ready-0").read_text())
wait_for(lambda: not Path(f"/proc/{victim}").exists())
report(0, "megaphase: rank 0 on here has ended without a word (killed, or out of memory), at 7")
sys.exit(1)
"""
    with launched(tmp_path, code, patience=30) as job:
        wait_until((tmp_path / "ready-0").exists)
        wait_until((tmp_path / "ready-0").read_text)
        pid = int((tmp_path / "ready-0").read_text())
        os.kill(pid, signal.SIGKILL)
        code, stderr = job.result()
    assert code == 1
    assert stderr == "megaphase: rank 0 on here was killed by SIGKILL, at 7\n"


def test_report_that_blames_another_than_the_killed_rank_is_not_believed(tmp_path):
    code = """
if rank == 0:
    wait()
wait_for((folder / "ready-0").exists)
wait_for((folder / "ready-0").read_text)
os.kill(int((folder / "ready-0").read_text()), signal.SIGKILL)
report(1, "megaphase: rank 1 failed: a connection was reset")
sys.exit(1)
"""
    with launched(tmp_path, code, patience=30) as job:
        code, stderr = job.result()
    pid = int((tmp_path / "ready-0").read_text())
    assert (code, stderr) == (1, killed(0, "SIGKILL", pid))


def test_first_report_is_what_is_said_where_no_rank_has_died(tmp_path):
    code = """
report(rank, "one line")
report(rank, "another")
sys.exit(1)
"""
    with launched(tmp_path, code, 3) as job:
        assert job.result() == (1, "one line\n")


def test_survivor_that_only_notes_sigterm_is_killed(tmp_path):
    code = """
if rank == 1:
    wait_for((folder / "ready-0").exists)
    sys.exit(1)
note_signals()
(folder / f"ready-{rank}").write_text(str(os.getpid()))
while True:
    time.sleep(1)
"""
    with launched(tmp_path, code) as job:
        assert job.result() == (1, "")
        assert job.signals() == ["SIGTERM", ""]
        assert not is_there(int((tmp_path / "ready-0").read_text()))


NOTE_UNTIL_TOLD = """
note_signals()
(folder / f"ready-{rank}").write_text(str(os.getpid()))
wait_for((folder / "go").exists)
sys.exit(75)
"""


def test_ctrl_c_reaches_all_ranks(tmp_path):
    with launched(tmp_path, NOTE_UNTIL_TOLD, patience=600) as job:
        job.pids()
        job.process.send_signal(signal.SIGINT)
        wait_until(partial(job.has_signals, 1))
        (tmp_path / "go").touch()
        assert job.result() == (75, "")
        assert job.signals() == ["SIGINT"] * 2


def test_second_ctrl_c_ends_all_at_once_and_says_what_is_lost(tmp_path):
    with launched(tmp_path, NOTE_UNTIL_TOLD, patience=600) as job:
        pids = job.pids()
        # Like a terminal; the ranks also get it from the launcher.
        os.killpg(job.process.pid, signal.SIGINT)
        wait_until(lambda: all("SIGINT" in each for each in job.signals()))
        time.sleep(1)  # far longer than the two ways of one press are apart
        os.killpg(job.process.pid, signal.SIGINT)
        assert job.result() == (130, "megaphase: ended at once: 7 steps are lost\n")
        assert not any(map(is_there, pids))


def test_ranks_that_leave_at_different_times_are_waited_for(tmp_path):
    code = f"time.sleep({2 * PATIENCE_SECONDS} * rank); print('done', flush=True)"
    with launched(tmp_path, code) as job:
        stdout, stderr = job.process.communicate(timeout=LIMIT_SECONDS)
        assert (job.process.returncode, stdout, stderr) == (0, "done\ndone\n", "")


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path):
    script = (
        "import sys; from megaphase.launch.local import run_as_ranks; "
        "run_as_ranks([sys.executable, '-c', sys.argv[1]], 2)"
    )
    rank = (
        "import os, pathlib, time; from megaphase.utils.process_lifetime import end_with_parent; "
        f"end_with_parent(); pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); "
        "time.sleep(600)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script, rank])
    while len(list(tmp_path.iterdir())) < 2:
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.kill()
    launcher.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    wait_until(lambda: not any(map(is_running, pids)))
