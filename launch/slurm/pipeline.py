"""Run a chain of commands as SLURM jobs, each of which waits for the jobs that it needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from megaphase.config.fields import Count, Few, FewOrZero, FilePath, RunName, Section
from megaphase.config.load import load_run_file
from megaphase.launch.slurm.command_line import PLACEHOLDER, filled, parsed
from megaphase.launch.slurm.job_file import (
    forget_jobs,
    read_job,
    refuse_second_job,
    remember_job,
)
from megaphase.launch.slurm.script import (
    LOGGED,
    REQUEUED,
    Resources,
    batch_script,
    check_gpu_type,
    check_memory,
    command_script,
    ending_seconds,
    node_options,
    refuse_pattern,
)
from megaphase.plan.batch_layout import check_batches_beforehand
from megaphase.utils.arguments import train_options
from megaphase.utils.errors import InputError
from megaphase.utils.files import make_directory, real_path
from megaphase.utils.names import shown
from megaphase.utils.slurm import cancel, refuse_large_array, sbatch_options, submit
from megaphase.utils.validation_errors import as_input_error, hint
from megaphase.utils.yaml_file import read_yaml

_TASK = "${SLURM_ARRAY_TASK_ID}"
# Options of sbatch that are keys of a step; those of the second table, only for a training.
_KEYS = {"array": "use the key array", "dependency": "use the key after", **LOGGED}
_TRAINING_KEYS = _KEYS | {
    **REQUEUED,
    "nodes": "use the key nodes",
    "cpus-per-task": "use the key cores",
    "gpus-per-node": "use the key gpus_per_node",
    "ntasks-per-node": "use the key gpus_per_node, or tasks_per_node",
    **dict.fromkeys(
        ("gpus", "gpus-per-task", "gres", "ntasks"),
        "use the keys nodes, gpus_per_node and gpu_type",
    ),
}
_OF_TRAINING = (
    *("nodes", "gpus_per_node", "gpu_type", "tasks_per_node"),
    *("restarts", "exclude_bad_nodes"),
)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _options(value: object) -> object:
    """Parse options of sbatch, given as a list or one string: `--partition=cpu --time=1:00:00`."""
    if isinstance(value, list):
        value = shlex.join(map(str, value))
    return _without(value, _KEYS) if isinstance(value, str) else value


def _without(options: str, refused: Mapping[str, str]) -> list[str]:
    try:
        return sbatch_options(options, refused)
    except InputError as error:
        raise ValueError(f"{error.problem}; {error.remedy}") from None


Names = Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(strict=False)]
NodeMemory = Annotated[str, BeforeValidator(check_memory)]
GpuType = Annotated[str, BeforeValidator(check_gpu_type)]
Options = Annotated[tuple[str, ...], BeforeValidator(_options), Field(strict=False)]


class Step(Section):
    """A job: either `command`, a command line after `megaphase`, or `train`.

    train: the arguments of `megaphase train`.
    after: steps that must have succeeded before this one starts.
    after_failures: it suffices that they have ended, even with an error.
    array: number of tasks that run the same command; %task is the index of a task, from 0, and
        %tasks their number.
    at_a_time: maximum number of these tasks that run at a time; not limited by default.
    cores: CPU cores per process.
    mem: main memory of each node, such as 480G; 0: all of it.
    exclusive: whether the job shares its nodes with no other job.
    sbatch: options for this job; they override the pipeline's.
    nodes, gpus_per_node, gpu_type, tasks_per_node, restarts, exclude_bad_nodes: for a training; see
        `megaphase launch slurm`.
    """

    command: str | None = None
    train: str | None = None
    after: Names = ()
    after_failures: bool = False
    array: Annotated[Count, Field(le=100_000)] | None = None
    at_a_time: Few | None = None
    cores: Few | None = None
    mem: NodeMemory | None = None
    exclusive: bool = False
    sbatch: Options = ()
    nodes: Few = 1
    gpus_per_node: FewOrZero = 8
    gpu_type: GpuType | None = None
    tasks_per_node: Few | None = None
    restarts: FewOrZero = 3
    exclude_bad_nodes: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.command is None) == (self.train is None):
            raise ValueError("give either command or train")
        strange = [key for key in _OF_TRAINING if key in self.model_fields_set]
        if self.command is not None and strange:
            raise ValueError(f"{strange[0]} applies to train only; leave it out, or use sbatch")
        if self.after_failures and not self.after:
            raise ValueError("after_failures has no effect without after; add after")
        if self.at_a_time is not None and self.array is None:
            raise ValueError("at_a_time applies to an array only; add array: N")
        if self.tasks_per_node is not None and self.gpus_per_node:
            raise ValueError("tasks_per_node applies to nodes without GPUs; add gpus_per_node: 0")
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ValueError("gpu_type applies to nodes with GPUs; leave it out")
        if self.train is not None:
            _without(shlex.join(self.sbatch), _TRAINING_KEYS)
        return self

    @property
    def line(self) -> str:
        """The command line after `megaphase`."""
        return self.command if self.command is not None else f"train {self.train}"


@dataclass(frozen=True)
class Training:
    """The training of a step.

    Attributes:
        arguments: of `megaphase train`; with %task if the step is an array.
        outputs: the run directory of each task.
        ending_seconds: see `script.ending_seconds`.
    """

    arguments: list[str]
    outputs: list[Path]
    ending_seconds: float


class Pipeline(Section):
    """A pipeline file: steps by name, and the folder of their output."""

    steps: dict[RunName, Step] = Field(min_length=1)
    logs: FilePath = Path("logs")
    sbatch: Options = ()

    _path: Path = PrivateAttr(default=Path("pipeline.yaml"))
    _trainings: dict[str, Training] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _sbatch_is_of_all_steps(self) -> Self:
        _without(shlex.join(self.sbatch), _TRAINING_KEYS)
        return self

    @property
    def folder(self) -> Path:
        """The file's folder, in which the commands run, and to which paths are relative."""
        return real_path(self._path.parent)

    @property
    def logs_folder(self) -> Path:
        """The folder of all jobs' output."""
        return self.folder / self.logs

    def where(self, key: str) -> str:
        """Return `FILE: KEY`, for messages."""
        return f"{self._path}: {key}"


def load_pipeline(path: Path, program: Any) -> Pipeline:
    """Load and check a pipeline.

    program: the `megaphase` app, which defines the commands and options.

    Raises:
        InputError: names the first invalid key.
    """
    try:
        pipeline = Pipeline.model_validate(read_yaml(path), context=real_path(path.parent))
    except ValidationError as error:
        raise as_input_error(path, error) from None
    pipeline._path = path
    refuse_pattern(pipeline.where("logs"), pipeline.logs_folder)
    for name, step in pipeline.steps.items():
        _check_names(pipeline, name, step)
    _order(pipeline)
    for name, step in pipeline.steps.items():
        key = "command" if step.command is not None else "train"
        where = pipeline.where(f"steps.{name}.{key}")
        if step.array is None and (found := PLACEHOLDER.search(step.line)):
            raise InputError(where, f"{found[0]} has no value", "add array: N to the step")
        parsed(where, filled(step.line, "0", step.array), program)
        if step.train is not None:
            pipeline._trainings[name] = _training(pipeline, name, step, program)
    return pipeline


def scripts(pipeline: Pipeline) -> dict[str, str]:
    """Return the batch script of every step, in an order in which they can be submitted."""
    return {name: _script(pipeline, name, pipeline.steps[name]) for name in _order(pipeline)}


def submit_pipeline(pipeline: Pipeline, behind: Sequence[str] = ()) -> dict[str, str]:
    """Submit every step; return the ids of the jobs by step.

    behind: other jobs for whose end every step waits, even if they fail.

    Raises:
        InputError: an array is larger than this cluster allows; nothing has been submitted.
        RunError: Slurm refuses a job; the others have been cancelled.
    """
    _check_arrays(pipeline)
    make_directory(pipeline.logs_folder)
    outputs = [each for training in pipeline._trainings.values() for each in training.outputs]
    before = {output: read_job(output) for output in outputs}
    jobs: dict[str, str] = {}
    try:
        for name, script in scripts(pipeline).items():
            jobs[name] = submit(script, _dependencies(pipeline.steps[name], jobs, behind))
            # Recorded at once: if this process is killed, its jobs are not submitted a second time.
            if name in pipeline._trainings:
                for task, output in enumerate(pipeline._trainings[name].outputs):
                    remember_job(output, *job_and_log(pipeline, name, jobs[name], task))
    except BaseException:
        if jobs:
            cancel(*jobs.values())
        for output, job in before.items():
            forget_jobs(output)
            if job is not None:
                remember_job(output, job.job, Path(job.log))
        raise
    return jobs


def job_and_log(pipeline: Pipeline, name: str, job: str, task: int = 0) -> tuple[str, Path]:
    """Return the id and the log of a step's job, or of one of its tasks if it is an array."""
    number = job if pipeline.steps[name].array is None else f"{job}_{task}"
    return number, pipeline.logs_folder / f"{name}-{number}.log"


def _check_arrays(pipeline: Pipeline) -> None:
    """Raise InputError if the largest array has more tasks than this cluster allows."""
    arrays = {name: step.array for name, step in pipeline.steps.items() if step.array is not None}
    if arrays:
        largest = max(arrays, key=arrays.__getitem__)
        where = pipeline.where(f"steps.{largest}.array")
        refuse_large_array(where, arrays[largest], "split the step")


def _dependencies(step: Step, jobs: Mapping[str, str], behind: Sequence[str]) -> list[str]:
    """Return a step's dependencies as options of sbatch; jobs: ids of the earlier steps' jobs."""
    conditions = []
    if step.after:
        kind = "afterany" if step.after_failures else "afterok"
        conditions.append(":".join([kind, *(jobs[other] for other in step.after)]))
    if behind:
        conditions.append(":".join(["afterany", *behind]))
    if not conditions:
        return []
    # A job whose dependencies can never be satisfied leaves the queue.
    return [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"]


def _check_names(pipeline: Pipeline, name: str, step: Step) -> None:
    """Raise InputError if the step waits for a step that does not exist."""
    for other in step.after:
        if other not in pipeline.steps:
            raise InputError(
                pipeline.where(f"steps.{name}.after"),
                f"no step {shown(other)}",
                hint(other, pipeline.steps, "the steps are"),
            )


def _order(pipeline: Pipeline) -> list[str]:
    """Return the steps, each after those for which it waits, and otherwise in the file's order."""
    ordered: list[str] = []
    while len(ordered) < len(pipeline.steps):
        ready = [
            name
            for name, step in pipeline.steps.items()
            if name not in ordered and all(other in ordered for other in step.after)
        ]
        if not ready:
            circle = _circle(pipeline, set(ordered))
            raise InputError(
                pipeline.where(f"steps.{circle[0]}.after"),
                f"the steps wait for each other in a circle: {', '.join(circle)}",
                "leave one out",
            )
        ordered.append(ready[0])
    return ordered


def _circle(pipeline: Pipeline, ordered: set[str]) -> list[str]:
    """Return steps of which each waits for the next, and the last for the first."""
    passed = [next(name for name in pipeline.steps if name not in ordered)]
    while True:
        name = next(name for name in pipeline.steps[passed[-1]].after if name not in ordered)
        if name in passed:
            return passed[passed.index(name) :]
        passed.append(name)


def _training(pipeline: Pipeline, name: str, step: Step, program: Any) -> Training:
    """Check everything about a training that can be checked before its corpora exist."""
    where = pipeline.where(f"steps.{name}.train")
    outputs: list[Path] = []
    for task in range(step.array or 1):
        given = parsed(where, filled(step.line, str(task), step.array), program)
        try:
            config = load_run_file(
                pipeline.folder / given["run_file"], tuple(given["overrides"] or ())
            )
            check_batches_beforehand(config, _resources(pipeline, name, step).processes)
            refuse_second_job(config.output)
        except InputError as error:
            raise InputError(where, str(error)) from None
        outputs.append(config.output)
    trained = [each for other in pipeline._trainings.values() for each in other.outputs]
    for number, output in enumerate(outputs):
        if output in [*trained, *outputs[:number]]:
            raise InputError(
                where, f"the run in {output} is trained twice", "give each run its own output"
            )
    given = parsed(where, step.line, program)
    options = train_options(given["source"], given["profile"], given["profile_steps"])
    run_file = str(pipeline.folder / given["run_file"])
    arguments = [run_file, *(given["overrides"] or []), *options]
    return Training(arguments, outputs, ending_seconds(config))


def _script(pipeline: Pipeline, name: str, step: Step) -> str:
    resources = _resources(pipeline, name, step)
    training = pipeline._trainings.get(name)
    if training is None:
        return command_script(resources, name, filled(step.line, _TASK, step.array))
    text = batch_script(
        resources,
        name,
        pipeline.logs_folder,
        training.arguments,
        prefix=f"{name}-",
        ending_seconds=training.ending_seconds,
    )
    return re.sub(r"(?m)^run=.*$", lambda line: filled(line[0], _TASK, step.array), text)


def _resources(pipeline: Pipeline, name: str, step: Step) -> Resources:
    return Resources(
        nodes=step.nodes,
        tasks_per_node=step.gpus_per_node or step.tasks_per_node or 1,
        gpus=step.gpus_per_node > 0,
        cores=step.cores,
        options=list(_own_options(pipeline, name, step)),
        exclude_bad_nodes=step.exclude_bad_nodes,
        restarts=step.restarts,
        gpu_type=step.gpu_type,
    )


def _own_options(pipeline: Pipeline, name: str, step: Step) -> Iterator[str]:
    """Yield the options of sbatch in addition to those of every script."""
    yield f"--chdir={pipeline.folder}"
    yield f"--output={pipeline.logs_folder}/{name}-{'%j' if step.array is None else '%A_%a'}.log"
    if step.array is not None:
        limit = "" if step.at_a_time is None else f"%{step.at_a_time}"
        yield f"--array=0-{step.array - 1}{limit}"
    yield from pipeline.sbatch
    yield from node_options(step.mem, exclusive=step.exclusive)
    yield from step.sbatch
