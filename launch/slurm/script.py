"""Fill in the header and settings of `train.sbatch` for one run."""

from __future__ import annotations

import importlib.resources
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaphase.config.run import RunConfig
from megaphase.utils.errors import InputError
from megaphase.utils.python_command import python_command

# Time in which the processes should end after one was found dead.
_LEAVING_SECONDS = 15.0

# The log is remembered, and a start adds to it.
LOGGED = {
    "output": "leave it out: the log is where the command says",
    "error": "leave it out: errors are in the log, too",
    "open-mode": "leave it out: a log is appended to",
    "chdir": "leave it out: relative paths are of the file that has them",
}
REQUEUED = {"no-requeue": "leave it out; --restarts (restarts) says how often a job starts again"}
# Options to use instead, since layout and memory are checked against them.
DETERMINED = {
    "nodes": "use --nodes",
    "gpus-per-node": "use --gpus-per-node",
    "ntasks-per-node": "use --gpus-per-node, or --tasks-per-node",
    "cpus-per-task": "use --cores",
    **dict.fromkeys(
        ("gpus", "gpus-per-task", "gres"), "use --nodes, --gpus-per-node and --gpu-type"
    ),
    **dict.fromkeys(("ntasks", "array"), "one task runs on each GPU"),
    **LOGGED,
    **REQUEUED,
}
_HEADER = re.compile(r"#SBATCH --([a-z-]+)(?:=(.*))?")


@dataclass(frozen=True)
class Resources:
    """The resources that a run requests from the cluster.

    Attributes:
        tasks_per_node: processes per node, one per GPU.
        gpus: whether to use GPUs; otherwise the run is on CPUs.
        gpu_type: Slurm's name of their type; None: any.
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
    gpu_type: str | None = None

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks_per_node


_MEMORY = re.compile(r"[0-9]+[KMGT]?")
_GPU_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<numbers>\d+(?::\d+){0,2})")


def check_memory(value: object) -> str:
    """Return the main memory of a node as sbatch takes it.

    Raises:
        ValueError: it is neither 0 nor a number with a unit.
    """
    if not _MEMORY.fullmatch(str(value)) or isinstance(value, bool):
        raise ValueError(f"{value} is no memory; write 480G, or 0 for all that a node has")
    return str(value)


def check_gpu_type(value: object) -> str:
    """Return the name of a type of GPU.

    Raises:
        ValueError: it is none that Slurm could have.
    """
    if not isinstance(value, str) or not _GPU_TYPE.fullmatch(value):
        raise ValueError(f"{value} is no type of GPU; write a name that `sinfo -o %G` shows")
    return value


def gpus_option(count: int, gpu_type: str | None) -> str:
    """Return the value of --gpus-per-node."""
    return str(count) if gpu_type is None else f"{gpu_type}:{count}"


def node_options(memory: str | None, *, exclusive: bool) -> list[str]:
    """Return options of sbatch; memory: of each node, see `check_memory`."""
    options = [] if memory is None else [f"--mem={memory}"]
    return [*options, "--exclusive"] if exclusive else options


def time_limit(resources: Resources) -> float | None:
    """Return the seconds that a start of the job may take; None if there is no limit."""
    header = {m[1]: m[2] for m in map(_HEADER.fullmatch, template().splitlines()) if m}
    given = [each.partition("=")[2] for each in resources.options if each.startswith("--time=")]
    match = _TIME.fullmatch((given or [header["time"]])[-1])
    if match is None:
        return None
    numbers = [int(each) for each in match["numbers"].split(":")]
    if match["days"] is not None:  # D-H, D-H:M, D-H:M:S
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((24 * int(match["days"]) + hours) * 60 + minutes) * 60 + seconds or None
    if len(numbers) < 3:  # M, M:S
        minutes, seconds = [*numbers, 0][:2]
        return 60 * minutes + seconds or None
    return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2] or None


def template() -> str:
    """Return the installed script."""
    return importlib.resources.files("megaphase.launch").joinpath("train.sbatch").read_text()


def ending_seconds(config: RunConfig) -> float:
    """Return how long the processes of a run may take to end after the first of them has.

    They find that one is dead within `faults.silent_seconds`; rank 0 waits for its trackers, one
    after the other, while the others have ended.
    """
    trackers = sum(tracker.wait_seconds for _, tracker in config.logging.trackers())
    return config.faults.silent_seconds + trackers + _LEAVING_SECONDS


def batch_script(
    resources: Resources,
    name: str,
    logs: Path,
    arguments: Sequence[str],
    *,
    prefix: str = "",
    ending_seconds: float | None = None,
) -> str:
    """Return the script of a run, which takes no arguments.

    Args:
        name: of the job.
        logs: the folder of its output, in files that begin with `prefix` and the job's id.
        arguments: of `megaphase train`: run file, overrides, options.
        ending_seconds: see `ending_seconds`; None: the script's default.
    """
    header = {
        "job-name": name,
        "nodes": str(resources.nodes),
        "gpus-per-node": (
            gpus_option(resources.tasks_per_node, resources.gpu_type) if resources.gpus else None
        ),
        "ntasks-per-node": str(resources.tasks_per_node),
        "output": str(logs / f"{prefix}%j.log"),
    }
    if resources.cores is not None:
        header["cpus-per-task"] = str(resources.cores)
    for option in resources.options:
        key, _, value = option.removeprefix("--").partition("=")
        header[key] = value
    settings = {
        "megaphase": f"({shlex.join(python_command('megaphase'))})",
        "restarts": str(resources.restarts),
        "exclude_bad_nodes": "yes" if resources.exclude_bad_nodes else "no",
        "logs": f'{shlex.quote(f"{logs}/{prefix}")}"$SLURM_JOB_ID-%N.log"',
        "run": f"({shlex.join(arguments)})",
    }
    if ending_seconds is not None:
        settings["patience"] = str(math.ceil(ending_seconds))
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
    command = f"exec {shlex.join(python_command('megaphase'))} {line.strip()}"
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
