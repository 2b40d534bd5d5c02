"""Stop signals leave a note and nothing else; exit code 75 is for a run that stopped on one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from data_support import LIMIT_SECONDS

from megaphase import cli
from megaphase.errors import Stopped
from megaphase.training.signals import StopSignals


def get_signals(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_first_signal_is_noted(number):
    with StopSignals() as signals:
        assert signals.received is None
        get_signals(number)
        assert signals.received == number.name
        get_signals(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)
        assert signals.received == number.name


def test_earlier_handlers_come_back():
    got = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        with suppress(ValueError), StopSignals():
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
from megaphase.training.signals import StopSignals
def storm():
    for _ in range(2000):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
with StopSignals() as signals:
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


@pytest.mark.parametrize(("rank", "line"), [("0", "megaphase: stopped on SIGTERM\n"), ("1", "")])
def test_stopped_run_wants_to_be_requeued(rank, line, monkeypatch, capsys):
    def stop() -> None:
        raise Stopped("stopped on SIGTERM")

    monkeypatch.setattr(cli, "app", stop)
    monkeypatch.setattr(cli, "SECONDS_FOR_RANK_0", 0.0)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 75
    assert capsys.readouterr().err == line
