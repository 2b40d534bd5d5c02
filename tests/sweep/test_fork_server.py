"""Commands of a sweep as forks of a process that has done the imports already."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_support import wait_until
from run_support import make_corpora, megaphase
from sweep_run_support import run_warm, settings, write

from megaphase.sweep.fork_server import ForkServer
from megaphase.sweep.local import start_command
from megaphase.utils.errors import EXIT_REQUEUE, EXIT_WRONG_INPUT, RunError


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(compiled=False) as server:
        yield server


@pytest.mark.slow
def test_losses_are_those_of_new_processes(tmp_path: Path, server: ForkServer) -> None:
    corpora = make_corpora(tmp_path / "corpora")
    found = []
    for name, start in (("forks", server.start), ("new", start_command)):
        (tmp_path / name).mkdir()
        content = settings(corpora, arms={"two-phase": {"pretrain": [0.6], "rates": [0.4]}})
        content["run"] |= {"test": {"samples": 6, "fraction": 0.1}}
        _, _, outcomes = run_warm(write(tmp_path / name, content), start)
        found.append({n: o.model_dump(exclude={"seconds"}) for n, o in outcomes.items()})
    assert found[0] == found[1]
    assert found[0]["two-phase-0.6-r0.4-p0.01-s11"]["test"]


def test_output_and_exit_codes_are_the_commands_own(tmp_path: Path, server: ForkServer) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    wrong = server.start(["train", "missing.yaml"], log, os.environ)
    assert wrong.wait() == EXIT_WRONG_INPUT
    new = subprocess.run(megaphase("train", "missing.yaml"), capture_output=True, text=True)
    assert log.read_text() == f"before\n{new.stdout}{new.stderr}"
    right = server.start(["--version"], tmp_path / "other", os.environ)
    assert right.wait() == right.wait() == right.poll() == 0
    right.send_signal(signal.SIGTERM)  # has ended
    assert os.getsid(server.pid or 0) != os.getsid(0)


def test_environments_are_the_commands_own(tmp_path: Path, server: ForkServer) -> None:
    files = []
    for number in ("1", "2"):
        files.append(tmp_path / number)
        command = ["launch", "slurm", "--help"]
        environment = {**os.environ, "COLUMNS": f"{60 * int(number)}"}
        assert server.start(command, files[-1], environment).wait() == 0
    narrow, wide = (max(map(len, file.read_text().splitlines())) for file in files)
    assert narrow <= 60 < wide <= 120


def test_a_signal_before_the_command_has_begun_is_not_lost(
    tmp_path: Path, server: ForkServer
) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        log = tmp_path / number.name
        fork = server.start(["train", "missing.yaml"], log, os.environ)
        os.kill(fork.pid, number)
        assert fork.wait() == EXIT_REQUEUE
        assert number.name in log.read_text()


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path, server: ForkServer) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file/log"):
        server.start(["--version"], tmp_path / "file" / "log", os.environ)


def test_forks_end_with_the_server_and_the_next_command_has_a_new_one(tmp_path: Path) -> None:
    with ForkServer(compiled=False) as server:
        assert server.pid is None
        slow = tmp_path / "slow.yaml"
        os.mkfifo(slow)  # reading it waits for a writer
        fork = server.start(["train", str(slow)], tmp_path / "log", os.environ)
        first = server.pid
        assert first is not None
        assert fork.poll() is None
        os.kill(first, signal.SIGTERM)  # as to all processes of a job
        assert fork.poll() is None
        os.kill(first, signal.SIGKILL)
        assert fork.wait() == -signal.SIGKILL
        wait_until(lambda: not Path(f"/proc/{fork.pid}").exists())
        assert server.start(["--version"], tmp_path / "log", os.environ).wait() == 0
        assert server.pid not in (None, first)
        second = server.pid
    wait_until(lambda: not Path(f"/proc/{second}").exists())


def test_a_server_that_cannot_import_is_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no such torch')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with ForkServer(compiled=False) as server, pytest.raises(RunError, match="cannot: see above"):
        server.start(["--version"], tmp_path / "log", environment)
    assert "no such torch" in capfd.readouterr().err


def test_a_sweep_that_is_killed_takes_the_server_along(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from megaphase.sweep.fork_server import ForkServer\n"
        "with ForkServer(compiled=False) as server:\n"
        "    fork = server.start(['train', sys.argv[1]], Path(sys.argv[2]), os.environ)\n"
        "    print(server.pid, fork.pid, flush=True)\n"
        "    fork.wait()\n"
    )
    slow = tmp_path / "slow.yaml"
    os.mkfifo(slow)
    process = subprocess.Popen(
        [sys.executable, "-c", code, slow, tmp_path / "log"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = process.stdout.readline().split()
    process.stdout.close()
    process.kill()
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert len(pids) == 2


@pytest.mark.slow
def test_forks_of_a_server_that_was_killed_are_no_business_of_the_next_one(
    tmp_path: Path,
) -> None:
    slow = tmp_path / "slow.yaml"
    os.mkfifo(slow)
    with ForkServer(compiled=False) as server:
        first, second = (
            server.start(["train", str(slow)], tmp_path / name, os.environ) for name in "ab"
        )
        os.kill(server.pid or 0, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        third = server.start(["train", str(slow)], tmp_path / "c", os.environ)
        assert second.wait() == -signal.SIGKILL
        assert third.poll() is None


def test_a_fork_can_be_killed_by_its_group_at_once(tmp_path: Path, server: ForkServer) -> None:
    slow = tmp_path / "slow.yaml"
    os.mkfifo(slow)
    for number in range(30):
        fork = server.start(["train", str(slow)], tmp_path / str(number), os.environ)
        os.killpg(fork.pid, signal.SIGKILL)
        assert fork.wait() == -signal.SIGKILL
