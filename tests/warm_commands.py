"""Megaphase commands in processes of their own that need not import torch and DeepSpeed again.

A fork server imports them once; every command is a fork of it, with its own standard output.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

from megaphase.launch.local import free_port, rank_environment

DEADLINE_SECONDS = 300.0

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["megaphase.cli", "megaphase.training.train", "deepspeed"])
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def run(*arguments: object, prepare: Callable[[], object] | None = None) -> CompletedProcess[str]:
    """Run a command of one process to its end, whatever its exit code (negative: the signal).

    prepare: called in the process before the command; it can be pickled.
    """
    argv = [str(each) for each in arguments]
    with tempfile.TemporaryDirectory(prefix="command-") as folder:
        process = _SERVER.Process(target=_main, args=(argv, folder, prepare))
        process.start()
        process.join(DEADLINE_SECONDS)
        timed_out = process.exitcode is None
        process.kill()
        process.join()
        stdout, stderr = (_text(Path(folder) / name) for name in ("stdout", "stderr"))
        assert not timed_out, f"not done after {DEADLINE_SECONDS:.0f} s: {stderr}"
        assert process.exitcode is not None
        return CompletedProcess(argv, process.exitcode, stdout, stderr)


def run_well(*arguments: object, prepare: Callable[[], object] | None = None) -> str:
    """Run a command that must succeed; its standard output."""
    result = run(*arguments, prepare=prepare)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_killed(*arguments: object, before_step: int) -> None:
    """Run `megaphase train`, which is ended by SIGKILL when it is about to train a step."""
    result = run("train", *arguments, prepare=partial(_kill_before, before_step))
    assert result.returncode == -signal.SIGKILL, result.stderr


def _kill_before(step: int) -> None:
    from megaphase.training.loop import TrainingLoop

    train_step = TrainingLoop._train_step

    def killed_step(loop, at, *arguments):
        if at.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(loop, at, *arguments)

    TrainingLoop._train_step = killed_step  # type: ignore[method-assign]  # in this process alone


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _main(argv: list[str], folder: str, prepare: Callable[[], object] | None) -> None:
    """In the fork: what the `megaphase` program does."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(rank_environment(0, 1, free_port()))
    import torch

    from megaphase import cli

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.argv = ["megaphase", *argv]
    cli.main()
