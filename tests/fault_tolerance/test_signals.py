"""Signals to the program and to a training: from the first instant, while it starts, while it
trains. Exit code 75: stopped by a signal; 130: ended at once by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from data_support import LIMIT_SECONDS

from megaphase import cli
from megaphase.fault_tolerance.stop_signals import StopSignals
from megaphase.utils.errors import Stopped


def get_signals(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_first_signal_is_noted(number):
    with StopSignals() as signals:
        signals.begin_training(lambda: "")
        assert signals.received is None
        get_signals(number)
        assert signals.received == number.name
        get_signals(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)
        assert signals.received == number.name


def test_earlier_handlers_come_back():
    got = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        with suppress(ValueError), StopSignals() as signals:
            signals.begin_training(lambda: "")
            get_signals(signal.SIGUSR1)
            raise ValueError
        assert got == []
        get_signals(signal.SIGUSR1)
        assert got == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_many_signals_at_once_interrupt_nothing():
    code = """
import os, signal, sys, threading
from megaphase.fault_tolerance.stop_signals import StopSignals
def storm():
    for _ in range(2000):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
with StopSignals() as signals:
    signals.begin_training(lambda: "")
    storming = threading.Thread(target=storm)
    storming.start()
    total = 0
    while storming.is_alive():
        total += sum(range(100))
    storming.join()
    assert total % 4950 == 0
    print(signals.received)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in ("SIGTERM\n", "SIGUSR1\n")


def run(code: str, *arguments: str, **variables: str) -> tuple[int, str]:
    """Return exit code and standard error of a new Python."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    return done.returncode, done.stderr


STARTING = """
import ctypes, os, signal, sys, threading, time
from megaphase.fault_tolerance.stop_signals import StopSignals
with StopSignals() as signals:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.Signals[sys.argv[1]])).start()
    # A process that waits in C for good, as in a collective, runs no handler of Python's.
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
    ("name", "told", "code"),
    [("SIGTERM", "SIGTERM", 75), ("SIGUSR1", "SIGUSR1", 75), ("SIGINT", "Ctrl-C", 130)],
)
def test_signal_ends_a_run_that_has_not_begun_to_train(name, told, code):
    line = (
        f"megaphase: {told} came to rank 0 before the first step: nothing is lost, the same "
        "command starts again\n"
    )
    assert run(STARTING, name) == (code, line)
    assert run(STARTING, name, RANK="1") == (code, "")


TRAINING = """
import os, signal, sys, time
from megaphase.fault_tolerance.stop_signals import StopSignals
def wait_for(what):
    end = time.monotonic() + 300
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)
with StopSignals() as signals:
    signals.begin_training(lambda: "7 steps are lost")
    for number in sys.argv[1].split():
        os.kill(os.getpid(), signal.Signals[number])
        wait_for(lambda: signals.received)
        time.sleep(float(sys.argv[2]))
sys.exit(75)
"""
SAVING = "megaphase: saving after this step; press Ctrl-C again to end at once\n"
ENDED = "megaphase: ended at once: 7 steps are lost\n"


@pytest.mark.parametrize(
    ("signals", "gap", "variables", "expected"),
    [
        ("SIGINT", 0.3, {}, (75, SAVING)),
        ("SIGINT SIGINT", 0.6, {}, (130, SAVING + ENDED)),
        ("SIGINT SIGTERM SIGUSR1", 0.6, {}, (75, SAVING)),
        # One press of Ctrl-C, from the terminal and from torchrun.
        ("SIGINT SIGINT", 0.02, {"WORLD_SIZE": "2"}, (75, SAVING)),
        ("SIGINT SIGINT", 1.8, {"WORLD_SIZE": "2", "RANK": "1"}, (130, "")),
        # `launch local` ends its ranks by itself.
        ("SIGINT SIGINT", 1.8, {"WORLD_SIZE": "2", "MEGAPHASE_REPORTS": "9"}, (75, SAVING)),
    ],
)
def test_first_ctrl_c_saves_and_a_second_ends_at_once(signals, gap, variables, expected):
    assert run(TRAINING, signals, str(gap), **variables) == expected


def test_ctrl_c_stays_ignored_where_it_was_before():
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + TRAINING
    assert run(code.replace("wait_for(lambda: signals.received)", ""), "SIGINT", "0.2") == (75, "")


STARTED = (
    "SIGTERM came to rank 0 before the first step: nothing is lost, the same command starts again"
)
PROGRAM = """
import os, signal, sys, threading
from megaphase import __main__
# Whatever the program imports after its first line takes long enough for a signal.
class Finder:
    def find_spec(self, name, *_):
        if name == "megaphase.cli":
            os.kill(os.getpid(), signal.Signals[sys.argv[1]])
sys.meta_path.insert(0, Finder())
__main__.main()
"""


@pytest.mark.parametrize(
    ("name", "told", "code"),
    [("SIGTERM", "SIGTERM", 75), ("SIGUSR1", "SIGUSR1", 75), ("SIGINT", "Ctrl-C", 130)],
)
def test_signal_while_the_program_imports_ends_it_in_a_line(name, told, code):
    line = f"megaphase: {told} came before anything had begun; nothing is lost\n"
    assert run(PROGRAM, name) == (code, line)
    assert run(PROGRAM, name, RANK="3") == (code, "")


def reported(code: str, *arguments: str) -> tuple[int, str, list[dict[str, object]]]:
    """Return exit code, standard error, and the reports to `launch local`."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"MEGAPHASE_REPORTS": str(write), "RANK": "0"},
            pass_fds=[write],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT_SECONDS,
        )
    finally:
        os.close(write)
    with open(read) as pipe:
        return done.returncode, done.stderr, [json.loads(line) for line in pipe]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("PROGRAM", "SIGTERM came before anything had begun; nothing is lost"),
        ("STARTING", STARTED),
    ],
)
def test_launcher_is_told_so_that_it_alone_speaks(code, told):
    [*ended, reports] = reported(globals()[code], "SIGTERM")
    assert ended == [75, ""]
    assert reports == [{"rank": None, "lines": [f"megaphase: {told}"]}]


def test_signal_that_was_blocked_comes_as_soon_as_the_program_can_take_it():
    code = (
        "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); "
        "os.kill(os.getpid(), signal.SIGTERM); from megaphase.__main__ import main; main()"
    )
    assert run(code)[0] == 75


COMMAND = """
import os, signal, sys, time
from megaphase import cli
def command():
    try:
        for number in sys.argv[1].split():
            os.kill(os.getpid(), signal.Signals[number])
        time.sleep(600)
    finally:
        print("cleaned up", file=sys.stderr)
def from_typer():
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
cli.app = from_typer if len(sys.argv) > 2 else command
cli.main()
"""


@pytest.mark.parametrize("typer", [(), ("typer",)])
@pytest.mark.parametrize(
    ("signals", "told", "code"),
    [
        ("SIGTERM", "SIGTERM", 75),
        ("SIGUSR1", "SIGUSR1", 75),
        ("SIGINT", "Ctrl-C", 130),
    ],
)
def test_signal_ends_any_other_command_in_a_line(signals, told, code, typer):
    expected = f"cleaned up\nmegaphase: stopped by {told}\n"
    assert run(COMMAND, signals, *typer) == (code, expected)


@pytest.mark.parametrize(("rank", "line"), [("0", "megaphase: stopped on SIGTERM\n"), ("1", "")])
def test_stopped_run_wants_to_be_requeued(rank, line, monkeypatch, capsys):
    def stop() -> None:
        raise Stopped("stopped on SIGTERM")

    monkeypatch.setattr(cli, "app", stop)
    monkeypatch.setattr(cli, "SECONDS_FOR_RANK_0", 0.0)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 75
    assert capsys.readouterr().err == line
