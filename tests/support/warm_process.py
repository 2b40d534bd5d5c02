"""Processes that do not import torch and DeepSpeed again: forks of a server that has.

Each is a separate process, with its own output, environment and process group, and can be killed
like any other; only its imports are already done, which take most of a short job's time.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
# The last one, torch's compiler, takes seconds; compiled kernels use it.
_SERVER.set_forkserver_preload(
    [
        "megaphase.cli",
        "megaphase.training.trainer",
        "warm_deepspeed",
        "torch._dynamo",
    ]
)
# Both are read while the server imports.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


class WarmProcess:
    """The part of subprocess.Popen that tests use."""

    def __init__(
        self,
        function: str,
        arguments: Sequence[str],
        *,
        stdout: Path,
        stderr: Path,
        env: Mapping[str, str],
        cwd: Path | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        """
        Args:
            function: `module:name`, called without arguments where sys.argv[1:] are `arguments`.
            prepare: called before it; a function of a test module.
        """
        streams = (str(stdout), str(stderr))
        settings = ({**os.environ, **env}, None if cwd is None else str(cwd))
        _start_server()
        self._process = _SERVER.Process(
            target=_main, args=(function, list(arguments), streams, settings, prepare)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code (negative: the signal), or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raise subprocess.TimeoutExpired if it takes too long."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("warm process", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; do nothing if the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _start_server() -> None:
    """Start the server, unless it runs, with this folder on the path of what it imports."""
    earlier = os.environ.get("PYTHONPATH")
    folders = [str(Path(__file__).parent), *([] if earlier is None else [earlier])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    try:
        forkserver.ensure_running()
    finally:
        if earlier is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = earlier


def _main(
    function: str,
    arguments: list[str],
    streams: tuple[str, str],
    settings: tuple[dict[str, str], str | None],
    prepare: Callable[[], object] | None,
) -> None:
    os.setsid()
    for number, path in enumerate(streams, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    environment, folder = settings
    os.environ.clear()
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    if prepare is not None:
        prepare()
    sys.argv = ["megaphase", *arguments]
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)()
