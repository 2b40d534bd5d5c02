"""Megaphase commands in processes of their own that need not import torch and DeepSpeed again.

A fork server imports them once; every command is a fork of it, with its own standard output, and
can be killed like any process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import TracebackType
from typing import Self

from megaphase.launch.local import free_port, rank_environment

DEADLINE_SECONDS = 300.0
POLL_SECONDS = 0.002

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["megaphase.cli", "megaphase.training.train", "deepspeed"])
os.environ.setdefault("DS_ACCELERATOR", "cpu")


class WarmCommand:
    """A running `megaphase` command of one process; leaving the block kills it."""

    def __init__(self, *arguments: object) -> None:
        self._arguments = [str(each) for each in arguments]
        self._folder = tempfile.TemporaryDirectory(prefix="command-")
        self._process = _SERVER.Process(target=_main, args=(self._arguments, self._folder.name))
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()
        self._folder.cleanup()

    def kill_when(self, happened: Callable[[], bool]) -> None:
        """SIGKILL at a moment that has to come before the command ends."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not happened():
            if not self._process.is_alive():
                raise AssertionError(f"ended too early: {self._said('stderr')}")
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(POLL_SECONDS)
        self._process.kill()
        self._process.join()
        assert self._process.exitcode == -signal.SIGKILL, "it ended before it could be killed"

    def result(self) -> CompletedProcess[str]:
        """Wait for the end."""
        self._process.join(DEADLINE_SECONDS)
        code = self._process.exitcode
        assert code is not None, f"not done after {DEADLINE_SECONDS:.0f} s: {self._said('stderr')}"
        return CompletedProcess(self._arguments, code, self._said("stdout"), self._said("stderr"))

    def _said(self, stream: str) -> str:
        path = Path(self._folder.name) / stream
        return path.read_text(errors="replace") if path.exists() else ""


def run(*arguments: object) -> CompletedProcess[str]:
    """Run a command to its end, whatever its exit code."""
    with WarmCommand(*arguments) as command:
        return command.result()


def run_well(*arguments: object) -> str:
    """Run a command that must succeed; its standard output."""
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _main(arguments: list[str], folder: str) -> None:
    """In the fork: what the `megaphase` program does."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(rank_environment(0, 1, free_port()))
    import torch

    from megaphase import cli

    torch.set_num_threads(1)
    sys.argv = ["megaphase", *arguments]
    cli.main()
