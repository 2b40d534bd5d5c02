"""`megaphase demo` forwards signals to its command and waits for the command to handle them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_support import LIMIT_SECONDS, wait_until

from megaphase.launch import demo

# Its command saves, like a training, and reports it.
DEMO = """
import sys
from pathlib import Path
from megaphase import cli
from megaphase.launch import demo
code = '''
import os, signal, sys, time
from pathlib import Path
folder, code = Path(sys.argv[1]), int(sys.argv[2])
def save(number, frame):
    (folder / "saved").write_text(signal.Signals(number).name)
    sys.exit(code)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, save)
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
(folder / "ready").touch()
time.sleep(600)
'''
folder = Path(sys.argv[1])
def app():
    demo._commands = lambda *_: [["first"], ["second"]]
    real = demo.subprocess.Popen
    demo.subprocess.Popen = lambda argv, **options: real(
        [sys.executable, "-c", code, str(folder), sys.argv[2]], **options
    )
    demo.run_demo(folder / "demo")
cli.app = app
cli.main()
"""


@pytest.mark.parametrize("found", [0, 1, 2, 8])
def test_a_single_gpu_is_left_aside(found, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    assert demo._devices() == ({"CUDA_VISIBLE_DEVICES": ""} if found == 1 else {})


@pytest.mark.parametrize(
    ("number", "name", "of_command"),
    [
        (signal.SIGTERM, "SIGTERM", 75),
        (signal.SIGUSR1, "SIGUSR1", 75),
        (signal.SIGINT, "Ctrl-C", 130),
    ],
)
def test_signal_goes_down_to_the_command(number, name, of_command, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DEMO, str(tmp_path), str(of_command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until((tmp_path / "ready").exists)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 75
    assert (tmp_path / "saved").read_text() == number.name
    assert stderr == (
        f"megaphase: {name} came: the demo ends with this command; run it and those that follow by "
        f"hand, or remove {tmp_path / 'demo'} and start again\n"
    )
