"""`train.sbatch` with its header and settings filled in for one run."""

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

# So long the processes may take to end after one was found to be dead.
_LEAVING_SECONDS = 15.0

_OPTION = re.compile(r"--([a-z-]+)(?:=.*)?", re.DOTALL)
# What is to be said instead: layout and memory are checked against it.
_OWN = {
    "nodes": "say --nodes",
    "gpus-per-node": "say --gpus-per-node",
    "ntasks-per-node": "say --gpus-per-node, or --tasks-per-node",
    "cpus-per-task": "say --cores",
    **dict.fromkeys(("gpus", "gpus-per-task", "gres"), "say --nodes and --gpus-per-node"),
    **dict.fromkeys(("ntasks", "array"), "one task runs on each GPU"),
}
_HEADER = re.compile(r"#SBATCH --([a-z-]+)(?:=(.*))?")


@dataclass(frozen=True)
class Resources:
    """What a run asks the cluster for.

    Attributes:
        tasks_per_node: processes of a node, one on each GPU.
        gpus: whether there are any; without, the run is on CPUs.
        cores: of each task; the script's own number if None.
        options: of sbatch, such as --partition=gpu; they win over the header's.
        exclude_bad_nodes: whether a node that fails its check is left out of the next start.
        restarts: in a row, without having come further.
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
    """More options of sbatch, taken apart as a shell does.

    refused: the remedy by the name of an option that must not be there; if nothing is given, what
        Resources say.

    Raises:
        InputError: one is not of the form --NAME=VALUE, or is refused.
    """
    try:
        options = shlex.split(text)
    except ValueError as error:
        raise InputError("--sbatch", f"cannot be taken apart ({error})", "check quotes") from None
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None:
            raise InputError(
                "--sbatch", f"{option!r} is no option", "write --NAME=VALUE, or --NAME"
            )
        if match[1] in refused:
            raise InputError("--sbatch", f"--{match[1]} has no place there", refused[match[1]])
    return options


def template() -> str:
    """The script as it is installed."""
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
    """The script of a run, which needs no arguments.

    Args:
        name: of the job.
        logs: the folder of its output, in files that begin with `prefix` and the job's id.
        arguments: of `megaphase train`: run file, overrides, options.
        silent_seconds: see FaultsConfig; what the script expects if None.
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
    """Refuse a folder for logs of which Slurm would read a part as a pattern, such as %j.

    where: file and key that name it.
    """
    if "%" in str(logs):
        raise InputError(where, f"Slurm reads % in {logs} as a pattern", "choose a path without it")


def command_script(resources: Resources, name: str, line: str) -> str:
    """The script of a job of one process, which runs a command of `megaphase`.

    line: what follows that word, for a shell.
    """
    options = [f"--job-name={name}", "--ntasks=1", "--requeue", "--open-mode=append"]
    if resources.cores is not None:
        options.append(f"--cpus-per-task={resources.cores}")
    header = [f"#SBATCH {shlex.quote(option)}" for option in (*options, *resources.options)]
    command = f"exec {shlex.quote(sys.executable)} -m megaphase {line.strip()}"
    return "\n".join(["#!/bin/bash", *header, command]) + "\n"


def _with_header(text: str, header: dict[str, str | None]) -> str:
    """Replace options of the header, leave out those that are None, add those it has not."""
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
