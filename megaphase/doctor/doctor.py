"""Runs all checks, each in a process of its own that ends in time."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaphase.doctor.finding import Finding, Settings, fault, first_line
from megaphase.utils.errors import InputError
from megaphase.utils.python_command import python_command

# Variables of a rank, which would make a check one of a job's processes.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
KILL_SECONDS = 5.0
GB = 1 << 30


@dataclass(frozen=True)
class Check:
    """A check's name in the report, its function in `checks`, and the seconds that it may take."""

    name: str
    function: str
    seconds: float


CHECKS = (
    Check("python", "software.python", 20),
    Check("packages", "software.packages", 60),
    Check("extensions", "software.extensions", 60),
    Check("compiler", "software.compiler", 120),
    Check("torch", "devices.torch", 120),
    Check("gpus", "devices.gpus", 120),
    Check("all-reduce", "devices.all_reduce", 180),
    Check("optimizer", "kernels.optimizer", 120),
    Check("deepspeed", "kernels.deepspeed", 300),
    Check("apex", "kernels.apex", 120),
    Check("triton", "kernels.triton", 180),
    Check("shared memory", "system.shared_memory", 20),
    Check("limits", "system.limits", 20),
    Check("locks", "file_system.locks", 30),
    Check("renames", "file_system.renames", 30),
    Check("disk speed", "file_system.speed", 60),
    Check("clock", "file_system.clock", 20),
    Check("slurm", "system.slurm", 30),
)


@dataclass(frozen=True)
class Result:
    """The findings of a check, and the seconds that it took."""

    check: str
    findings: list[Finding]
    seconds: float


def check_directory(directory: Path) -> None:
    """Refuse a directory in which nothing can be written.

    Raises:
        InputError: it is missing, no directory, or read-only.
    """
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"--dir {directory}",
            f"cannot be written ({reason})",
            "give the directory in which runs are to be stored",
        ) from None


def run_checks(settings: Settings) -> Iterator[Result]:
    """Yield the results one by one, as the checks end."""
    for check in CHECKS:
        began = time.monotonic()
        found = run_bounded(check, settings)
        yield Result(check.name, found, time.monotonic() - began)


def run_bounded(check: Check, settings: Settings) -> list[Finding]:
    """Run a check in a process of its own; one that crashes or does not end in time is a fault."""
    command = python_command("megaphase.doctor.run_check", check.function)
    environment = {key: value for key, value in os.environ.items() if key not in OF_A_RANK}
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*command, str(settings.directory.absolute()), "gpu" if settings.gpu else "any"],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=said,
            env=environment,
            start_new_session=True,  # so that what it starts is killed with it
        )
        try:
            code = process.wait(check.seconds)
        except subprocess.TimeoutExpired:
            text = f"did not end in {check.seconds:g} s"
            return [fault(text, "look for a hanging file system, driver or compiler on this node")]
        finally:
            _kill(process)
        if code == 0:
            return [Finding(**each) for each in json.loads(_content(answer))]
        lines = _content(said).splitlines() or ["without a message"]
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        text = f"crashed ({how}: {first_line(lines[-1])})"
        return [fault(text, "install what it tries again, built for this machine")]


def _content(file: Any) -> str:
    file.seek(0)
    content: bytes = file.read()
    return content.decode("utf-8", errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started, which may first remove its files; one that waits
    for a dead disk is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)


def describe_machine() -> str:
    """Return name, system, cores and memory of this machine, in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    return (
        f"{socket.gethostname()}: {platform.system()} {platform.release()}, "
        f"{os.cpu_count()} CPU cores, {memory:.0f} GB of memory"
    )


def summary(results: list[Result], settings: Settings) -> dict[str, Any]:
    """Return all results as plain data."""
    return {
        "machine": describe_machine(),
        "directory": str(settings.directory.absolute()),
        "checks": [
            {"check": result.check, "seconds": round(result.seconds, 2)} | asdict(finding)
            for result in results
            for finding in result.findings
        ],
        **counts(results),
    }


def counts(results: list[Result]) -> Mapping[str, int]:
    """Return the number of findings by verdict."""
    verdicts = [finding.verdict for result in results for finding in result.findings]
    return {
        "ok": verdicts.count("ok"),
        "warnings": verdicts.count("warning"),
        "faults": verdicts.count("fault"),
    }
