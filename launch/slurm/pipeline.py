"""A chain of commands as SLURM jobs, each of which waits for those that it needs."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from megaphase.config import RunConfig, load_run_file
from megaphase.config.fields import Count, CountOrZero, FilePath, Section
from megaphase.errors import InputError
from megaphase.files import make_directory
from megaphase.launch.slurm.job_file import remember_job
from megaphase.launch.slurm.script import Resources, batch_script
from megaphase.launch.slurm.submit import refuse_second_job
from megaphase.slurm import cancel, submit
from megaphase.validation_errors import as_input_error, hint
from megaphase.yaml_file import read_yaml

_PLACEHOLDER = re.compile(r"%(tasks|task)\b")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


class Step(Section):
    """A job. Either `command`, what stands behind `megaphase` on a command line, or `train`.

    after: steps that must have ended well before.
    array: so many tasks run the command; %task in it is a task's number from 0, %tasks how many.
    train: a run file, with values that replace its own; nodes, gpus_per_node, tasks_per_node,
        restarts, exclude_bad_nodes: see `megaphase launch slurm`.
    sbatch: options of this job; they win over the pipeline's.
    """

    command: str | None = None
    train: str | None = None
    after: Names = ()
    array: Count | None = None
    cores: Count | None = None
    nodes: Count = 1
    gpus_per_node: CountOrZero = 8
    tasks_per_node: Count | None = None
    sbatch: Names = ()
    restarts: CountOrZero = 3
    exclude_bad_nodes: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.command is None) == (self.train is None):
            raise ValueError("give either command or train")
        if self.array is not None and self.command is None:
            raise ValueError("array is for a command")
        return self


class Pipeline(Section):
    """The file: steps by name, and the folder of their output."""

    steps: dict[str, Step] = Field(min_length=1)
    logs: FilePath = Path("logs")
    sbatch: Names = ()

    _path: Path = PrivateAttr(default=Path("pipeline.yaml"))

    @property
    def folder(self) -> Path:
        """In which the commands run, and from which relative paths are taken: the file's."""
        return self._path.resolve().parent

    def where(self, key: str) -> str:
        """`FILE: KEY`, for messages."""
        return f"{self._path}: {key}"


def load_pipeline(path: Path, program: Any) -> Pipeline:
    """A checked pipeline.

    program: `megaphase` itself, which knows what commands and options there are.

    Raises:
        InputError: naming the first key that is wrong.
    """
    try:
        pipeline = Pipeline.model_validate(read_yaml(path))
    except ValidationError as error:
        raise as_input_error(path, error) from None
    pipeline._path = path
    for name, step in pipeline.steps.items():
        for other in step.after:
            if other not in pipeline.steps:
                raise InputError(
                    pipeline.where(f"steps.{name}.after"),
                    f"no step {other!r}",
                    hint(other, pipeline.steps, "the steps are"),
                )
        if step.command is not None:
            _check_command(pipeline.where(f"steps.{name}.command"), step, program)
        else:
            _check_run(pipeline, name, step)
    _order(pipeline)
    return pipeline


def scripts(pipeline: Pipeline) -> dict[str, str]:
    """The batch script of every step, in an order in which they can be submitted."""
    return {name: _script(pipeline, name, pipeline.steps[name]) for name in _order(pipeline)}


def submit_pipeline(pipeline: Pipeline) -> dict[str, str]:
    """Queue every step; the ids of the jobs by step.

    Raises:
        RunError: Slurm refuses one; the others have been taken from the queue.
    """
    make_directory(pipeline.folder / pipeline.logs)
    jobs: dict[str, str] = {}
    try:
        for name, script in scripts(pipeline).items():
            step = pipeline.steps[name]
            options = [f"--chdir={pipeline.folder}"]
            if step.after:
                needed = ":".join(jobs[other] for other in step.after)
                options += [f"--dependency=afterok:{needed}", "--kill-on-invalid-dep=yes"]
            jobs[name] = submit(script, options)
            if step.train is not None:
                output = _run(pipeline, step).output
                remember_job(output, jobs[name], _logs(pipeline) / f"{name}-{jobs[name]}.log")
    except BaseException:
        if jobs:
            cancel(*jobs.values())
        raise
    return jobs


def _order(pipeline: Pipeline) -> list[str]:
    """The steps, each behind those that it waits for; otherwise as they stand in the file."""
    ordered: list[str] = []
    while len(ordered) < len(pipeline.steps):
        ready = [
            name
            for name, step in pipeline.steps.items()
            if name not in ordered and all(other in ordered for other in step.after)
        ]
        if not ready:
            name = next(name for name in pipeline.steps if name not in ordered)
            raise InputError(
                pipeline.where(f"steps.{name}.after"),
                "the steps wait for each other in a circle",
                "leave one out",
            )
        ordered.append(ready[0])
    return ordered


def _check_command(where: str, step: Step, program: Any) -> None:
    """Whether there is such a command, with such options."""
    assert step.command is not None
    try:
        words = shlex.split(_filled(step.command, {"task": "0", "tasks": str(step.array or 1)}))
    except ValueError as error:
        raise InputError(where, f"cannot be taken apart ({error})", "check its quotes") from None
    if step.array is None and (found := _PLACEHOLDER.search(step.command)):
        raise InputError(where, f"{found[0]} stands for nothing", "add array: N to the step")
    try:
        _parse(program, words)
    except typer.Exit:  # --help, or the like
        pass
    except Exception as error:
        # typer's errors have no public base class; this is how all of them say what is wrong.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        problem = message() or "something is missing behind it"
        raise InputError(where, problem, "see `megaphase --help`") from None


def _parse(command: Any, words: list[str], parent: Any = None) -> None:
    """Parse a command line down to the last command in it, and run nothing."""
    context = command.make_context(command.name, list(words), parent=parent)
    if hasattr(command, "resolve_command"):  # a group of commands
        _, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        _parse(found, rest, context)


def _check_run(pipeline: Pipeline, name: str, step: Step) -> None:
    """What can be known before the corpora are there."""
    try:
        _run(pipeline, step).micro_batches(_resources(pipeline, step).processes)
    except InputError as error:
        raise InputError(pipeline.where(f"steps.{name}.train"), str(error)) from None
    refuse_second_job(_run(pipeline, step).output)


def _run(pipeline: Pipeline, step: Step) -> RunConfig:
    run_file, *overrides = shlex.split(step.train or "")
    return load_run_file(pipeline.folder / run_file, tuple(overrides))


def _script(pipeline: Pipeline, name: str, step: Step) -> str:
    if step.train is not None:
        run_file, *overrides = shlex.split(step.train)
        arguments = [str(pipeline.folder / run_file), *overrides]
        return batch_script(
            _resources(pipeline, step), name, _logs(pipeline), arguments, prefix=f"{name}-"
        )
    options = [f"--job-name={name}", "--ntasks=1", "--requeue", "--open-mode=append"]
    number = "%A_%a" if step.array else "%j"
    options.append(f"--output={_logs(pipeline) / f'{name}-{number}.log'}")
    if step.array:
        options.append(f"--array=0-{step.array - 1}")
    if step.cores:
        options.append(f"--cpus-per-task={step.cores}")
    header = [f"#SBATCH {shlex.quote(each)}" for each in (*options, *pipeline.sbatch, *step.sbatch)]
    values = {"task": '"$SLURM_ARRAY_TASK_ID"', "tasks": str(step.array)}
    command = (
        f"exec {shlex.quote(sys.executable)} -m megaphase {_filled(step.command or '', values)}"
    )
    return "\n".join(["#!/bin/bash", *header, command]) + "\n"


def _resources(pipeline: Pipeline, step: Step) -> Resources:
    return Resources(
        nodes=step.nodes,
        tasks_per_node=step.gpus_per_node or step.tasks_per_node or 1,
        gpus=step.gpus_per_node > 0,
        cores=step.cores,
        options=[*pipeline.sbatch, *step.sbatch],
        exclude_bad_nodes=step.exclude_bad_nodes,
        restarts=step.restarts,
    )


def _filled(command: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: values[found[1]], command)


def _logs(pipeline: Pipeline) -> Path:
    return pipeline.folder / pipeline.logs
