"""Starts `megaphase` commands as forks of a process that has imported torch and DeepSpeed already.

Imports are most of a small run's start, and a sweep starts two commands a run. Each fork is a
process of its own, with its own session, log and environment, and ends like any other.

Only for machines without a GPU: CUDA does not survive a fork, and DeepSpeed looks for it when it is
imported.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megaphase.utils.errors import RunError
from megaphase.utils.files import os_errors_named
from megaphase.utils.process_lifetime import end_with_parent, ends_with_this_process
from megaphase.utils.python_command import python_command
from megaphase.utils.set_aside import make_way_for_file
from megaphase.utils.signals import ALL_SIGNALS

POLL_SECONDS = 0.01
_MODULES = ("megaphase.cli", "megaphase.training.trainer", "megaphase.training.evaluate")
_COMPILER_MODULES = ("torch._dynamo", "torch._inductor.compile_fx")


class ForkServer:
    """The process that is forked, which starts with the first command; its end ends all forks.

    start: see `megaphase.sweep.local.Start`.
    """

    def __init__(self, *, compiled: bool) -> None:
        """compiled: whether commands use kernels compiled by torch, whose compiler is imported,
        too."""
        self._compiled = compiled
        self._server: _Server | None = None

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.end()

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Fork:
        """Start a command, with its output appended to the log.

        Raises:
            RunError: the log cannot be written, or the command cannot be started.
        """
        with os_errors_named(log):
            make_way_for_file(log, "a log")
            log.open("ab").close()
        if self._server is None or self._server.has_ended():
            if self._server is not None:
                self._server.end()
            self._server = _Server(environment, compiled=self._compiled)
        request = {"command": list(command), "log": str(log), "env": dict(environment)}
        answer = self._server.ask(request)
        if not isinstance(answer, int):
            reason = answer or self._server.reason()
            raise RunError(f"{log}: the process that starts the runs cannot: {reason}")
        return Fork(self._server, answer)

    @property
    def pid(self) -> int | None:
        """The server's process, if it runs."""
        return None if self._server is None or self._server.has_ended() else self._server.pid


class _Server:
    """A running server; forks belong to the one that has started them."""

    def __init__(self, environment: Mapping[str, str], *, compiled: bool) -> None:
        self._socket, other_end = socket.socketpair()
        self._answers = self._socket.makefile("r")
        arguments = [str(other_end.fileno()), *(["compiled"] if compiled else [])]
        with other_end:
            self._process = subprocess.Popen(
                python_command("megaphase.sweep.fork_server", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**environment, **ends_with_this_process()},
                pass_fds=[other_end.fileno()],
                start_new_session=True,
            )
        self.pid = self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, request: Mapping[str, Any]) -> int | str | None:
        """Return the answer, a number or what went wrong; None, too, if the server has ended."""
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            line = self._answers.readline()
        except (OSError, ValueError):  # ValueError: closed by `end`
            return None
        return json.loads(line) if line else None

    def reason(self) -> str:
        """Return why it has ended, once it answers no more."""
        code = self._process.wait()
        return f"it was killed by {signal.Signals(-code).name}" if code < 0 else "see above"

    def end(self) -> None:
        """Kill it, if it has not ended."""
        self._answers.close()
        self._socket.close()
        self._process.kill()
        self._process.wait()


class Fork:
    """A running command; see `megaphase.sweep.local.Process`."""

    def __init__(self, server: _Server, pid: int) -> None:
        self._server, self.pid = server, pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code (negative: the signal), or None while it runs."""
        if self._code is None:
            answer = self._server.ask({"poll": self.pid})
            if isinstance(answer, int):
                self._code = answer
            elif self._server.has_ended():
                self._code = -signal.SIGKILL  # killed with the server
        return self._code

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        while (code := self.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; do nothing if the command has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _serve(connection: socket.socket) -> bool:
    """Answer requests until the other end is closed, and return False; in every fork, return True
    where the command is to begin."""
    server = os.getpid()
    requests = connection.makefile("r")
    for line in requests:
        request = json.loads(line)
        answer: int | str | None = None
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            begun, has_begun = os.pipe()
            try:
                answer = os.fork()
            except OSError as error:
                answer = str(error.strerror)
            if answer == 0:
                connection.close()
                requests.close()
                os.close(begun)
                _become(request, server)
                os.close(has_begun)
                return True
            # Who kills the fork does so by its group, which it must have by now.
            os.close(has_begun)
            os.read(begun, 1)
            os.close(begun)
        connection.sendall(json.dumps(answer).encode() + b"\n")
    return False


def _become(request: Mapping[str, Any], server: int) -> None:
    """Make this fork what a new process for the command would be."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update({**request["env"], **ends_with_this_process(server)})
    sys.argv = ["megaphase", *request["command"]]


def main() -> None:
    """Import, then fork for each request on the socket whose descriptor is the first argument."""
    # Nothing but the end of the sweep ends the server. A fork unblocks them when it handles them,
    # and what arrives before then is not lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    end_with_parent()
    descriptor, *compiled = sys.argv[1:]
    connection = socket.socket(fileno=int(descriptor))
    environment = dict(os.environ)
    for module in (*_MODULES, *(_COMPILER_MODULES if compiled else ())):
        importlib.import_module(module)
    importlib.import_module("megaphase.training.deepspeed_import").import_deepspeed()
    os.environ.clear()  # the imports have set some, as the command's own imports will
    os.environ.update(environment)
    gc.collect()
    gc.freeze()  # or every fork would look through, and so copy, all objects of these modules
    if _serve(connection):
        runpy.run_module("megaphase", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
