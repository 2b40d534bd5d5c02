"""Run single-process megaphase commands in forks that have already imported torch and DeepSpeed.

Unlike `distributed.launch`, they can run a function before the command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

from warm_process import WarmProcess

from megaphase.launch.local import free_port, rank_environment

DEADLINE_SECONDS = 300.0


def run(*arguments: object, prepare: Callable[[], object] | None = None) -> CompletedProcess[str]:
    """Run a command to its end, whatever its exit code (negative: the signal).

    prepare: called in the process before the command; must be picklable.
    """
    argv = [str(each) for each in arguments]
    with tempfile.TemporaryDirectory(prefix="command-") as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = WarmProcess(
            "megaphase.cli:main",
            argv,
            stdout=stdout,
            stderr=stderr,
            env=rank_environment(0, 1, free_port()),
            prepare=prepare,
        )
        try:
            code = process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"not done after {DEADLINE_SECONDS:.0f} s: {_text(stderr)}"
            ) from None
        finally:
            process.kill()
        return CompletedProcess(argv, code, _text(stdout), _text(stderr))


def run_well(*arguments: object, prepare: Callable[[], object] | None = None) -> str:
    """Run a command that must succeed; return its standard output."""
    result = run(*arguments, prepare=prepare)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_killed(
    *arguments: object, before_step: int, prepare: Callable[[], object] | None = None
) -> None:
    """Run `megaphase train` and kill it with SIGKILL just before it trains a step."""
    result = run("train", *arguments, prepare=partial(_prepare_to_kill, before_step, prepare))
    assert result.returncode == -signal.SIGKILL, result.stderr


def _prepare_to_kill(step: int, prepare: Callable[[], object] | None) -> None:
    kill_before(step)
    if prepare is not None:
        prepare()


def kill_before(step: int, rank: int = 0) -> None:
    """Prepare a run's processes: kill one of them just before it trains a step."""
    signal_before("train_step", rank, signal.SIGKILL, lambda run: run.state.step + 1 == step)


def signal_before(
    method: str,
    rank: int,
    number: signal.Signals,
    when: Callable[..., bool] = lambda run: True,
) -> None:
    """Prepare a run's processes: send one of them a signal before each call of a method of its
    trainer for which `when` is true."""
    from megaphase.training.trainer import Trainer

    if int(os.environ["RANK"]) != rank:
        return
    call = getattr(Trainer, method)

    def signalled(trainer, *arguments):
        if when(trainer):
            os.kill(os.getpid(), number)
        return call(trainer, *arguments)

    setattr(Trainer, method, signalled)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
