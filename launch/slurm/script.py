"""Fill in the header and settings of `train.sbatch` for one run."""

from __future__ import annotations

import importlib.resources
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaphase.utils.errors import InputError

# Time in which the processes should end after one was found dead.
_LEAVING_SECONDS = 15.0

_OPTION = re.compile(r"--([a-z-]+)(?:=.*)?", re.DOTALL)
# Options to use instead, since layout and memory are checked against them.
_OWN = {
    "nodes": "use --nodes",
    "gpus-per-node": "use --gpus-per-node",
    "ntasks-per-node": "use --gpus-per-node, or --tasks-per-node",
    "cpus-per-task": "use --cores",
    **dict.fromkeys(("gpus", "gpus-per-task", "gres"), "use --nodes and --gpus-per-node"),
    **dict.fromkeys(("ntasks", "array"), "one task runs on each GPU"),
}
_HEADER = re.compile(r"#SBATCH --([a-z-]+)(?:=(.*))?")


@dataclass(frozen=True)
class Resources:
    """The resources that a run requests from the cluster.

    Attributes:
        tasks_per_node: processes per node, one per GPU.
        gpus: whether to use GPUs; otherwise the run is on CPUs.
        cores: CPU cores per task; None: the script's own number.
        options: options of sbatch, such as --partition=gpu; they override the header's.
        exclude_bad_nodes: whether a node that fails its check is excluded from the next start.
        restarts: maximum number of restarts in a row without progress.
    """

    nodes: int
    tasks_per_node: int
    gpus: bool
    cores: int | None
    options: Sequence[str]
    exclude_bad_nodes: bool = False
    restarts: int = 3

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks_per_node


def sbatch_options(text: str, refused: Mapping[str, str] = _OWN) -> list[str]:
    """Parse additional options of sbatch as a shell would.

    refused: maps the name of each option that is not allowed to the remedy; by default, those
        determined by Resources.

    Raises:
        InputError: one is not of the form --NAME=VALUE, or is not allowed.
    """
    try:
        options = shlex.split(text)
    except ValueError as error:
        raise InputError("--sbatch", f"cannot be parsed ({error})", "check quotes") from None
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None:
            raise InputError(
                "--sbatch", f"{option!r} is not an option", "write --NAME=VALUE, or --NAME"
            )
        if match[1] in refused:
            raise InputError("--sbatch", f"--{match[1]} is not allowed there", refused[match[1]])
    return options


def template() -> str:
    """Return the installed script."""
    return importlib.resources.files("megaphase.launch").joinpath("train.sbatch").read_text()


def batch_script(
    resources: Resources,
    name: str,
    logs: Path,
    arguments: Sequence[str],
    *,
    prefix: str = "",
    silent_seconds: float | None = None,
) -> str:
    """Return the script of a run, which takes no arguments.

    Args:
        name: of the job.
        logs: the folder of its output, in files that begin with `prefix` and the job's id.
        arguments: of `megaphase train`: run file, overrides, options.
        silent_seconds: see FaultsConfig; None: the script's default.
    """
    header = {
        "job-name": name,
        "nodes": str(resources.nodes),
        "gpus-per-node": str(resources.tasks_per_node) if resources.gpus else None,
        "ntasks-per-node": str(resources.tasks_per_node),
        "output": str(logs / f"{prefix}%j.log"),
    }
    if resources.cores is not None:
        header["cpus-per-task"] = str(resources.cores)
    for option in resources.options:
        key, _, value = option.removeprefix("--").partition("=")
        header[key] = value
    settings = {
        "megaphase": f"({shlex.quote(sys.executable)} -m megaphase)",
        "restarts": str(resources.restarts),
        "exclude_bad_nodes": "yes" if resources.exclude_bad_nodes else "no",
        "logs": f'{shlex.quote(f"{logs}/{prefix}")}"$SLURM_JOB_ID-%N.log"',
        "run": f"({shlex.join(arguments)})",
    }
    if silent_seconds is not None:
        settings["patience"] = str(math.ceil(silent_seconds + _LEAVING_SECONDS))
    text = _with_header(template(), header)
    for variable, value in settings.items():
        line = re.compile(rf"^{variable}=.*$", re.MULTILINE)
        assert len(line.findall(text)) == 1, variable
        text = line.sub(lambda _, v=variable, to=value: f"{v}={to}", text)  # type: ignore[misc]
    return text


def refuse_pattern(where: str, logs: Path) -> None:
    """Reject a folder for logs in which Slurm would interpret a part as a pattern, such as %j.

    where: file and key that name it.
    """
    if "%" in str(logs):
        raise InputError(where, f"Slurm reads % in {logs} as a pattern", "choose a path without it")


def command_script(resources: Resources, name: str, line: str) -> str:
    """Return the script of a single-process job that runs a `megaphase` command.

    line: the command line after `megaphase`, for a shell.
    """
    options = [f"--job-name={name}", "--ntasks=1", "--requeue", "--open-mode=append"]
    if resources.cores is not None:
        options.append(f"--cpus-per-task={resources.cores}")
    header = [f"#SBATCH {shlex.quote(option)}" for option in (*options, *resources.options)]
    command = f"exec {shlex.quote(sys.executable)} -m megaphase {line.strip()}"
    return "\n".join(["#!/bin/bash", *header, command]) + "\n"


def _with_header(text: str, header: dict[str, str | None]) -> str:
    """Replace options of the header, remove those that are None, and add missing ones."""
    lines: list[str | None] = []
    left = dict(header)
    for line in text.splitlines():
        match = _HEADER.fullmatch(line)
        if match and match[1] in header:
            left.pop(match[1], None)
            lines.append(_option(match[1], header[match[1]]))
        else:
            lines.append(line)
    last = max(i for i, line in enumerate(lines) if line and _HEADER.fullmatch(line))
    lines[last + 1 : last + 1] = [_option(key, value) for key, value in left.items()]
    return "\n".join(line for line in lines if line is not None) + "\n"


def _option(key: str, value: str | None) -> str | None:
    if value is None:
        return None
    return f"#SBATCH --{key}={shlex.quote(value)}" if value else f"#SBATCH --{key}"
