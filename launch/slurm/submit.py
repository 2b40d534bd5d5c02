"""Check a run before it is queued, so that it does not fail after hours of waiting."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from megaphase.config.run import RunConfig
from megaphase.estimate.hardware import hardware_of, planned_card
from megaphase.estimate.memory_table import memory_sentences, memory_summary, memory_warnings
from megaphase.estimate.setup import PhaseSetup
from megaphase.estimate.step_time_table import NO_TIME, duration, run_seconds, time_sentence
from megaphase.launch.slurm.job_file import FOLDER, SubmittedJob, refuse_second_job, remember_job
from megaphase.launch.slurm.script import (
    Resources,
    batch_script,
    ending_seconds,
    refuse_pattern,
    time_limit,
)
from megaphase.plan.branch import choose_branch
from megaphase.plan.held_out_noise import held_out_warnings
from megaphase.plan.load_plan import open_run, phase_setups, preview_plan, stage_setups
from megaphase.plan.plan import Plan
from megaphase.plan.preview import plan_warnings
from megaphase.training.new_tokens import TrainedTokens
from megaphase.training.run_directory import RunDirectory
from megaphase.training.tracker_check import check_trackers
from megaphase.utils.errors import InputError
from megaphase.utils.files import make_directory, real_path
from megaphase.utils.slurm import submit


def check(
    run_file: Path,
    overrides: Sequence[str],
    source: str | None,
    resources: Resources,
    gpu_memory_gb: float | None,
    console: Console,
) -> RunConfig:
    """Check run file, tokenizer, corpora, layout and memory, build the plan, and print a summary.

    gpu_memory_gb: of a GPU; None: that of the card that the run file names.

    Raises:
        InputError: the run cannot start, or does not fit.
    """
    config, tokenizer = open_run(run_file, overrides)
    _refuse_unwritable(config)
    refuse_pattern(config.where("output"), logs_folder(config.output))
    RunDirectory(config.output).refuse_other_run(config)
    check_trackers(config)
    branch = choose_branch(config, source)
    TrainedTokens.of(config, tokenizer.vocab_size, branch)
    setups = phase_setups(config, tokenizer, resources.processes)
    needed = memory_summary(setups, gpu_memory_gb or planned_card(config).memory_gb)
    does_not_fit = memory_warnings(needed)
    if resources.gpus and does_not_fit:
        raise InputError(config.where("parallel"), does_not_fit[0], "or set --memory")
    refuse_second_job(config.output)
    plan = preview_plan(config, tokenizer, branch, processes=resources.processes, to_train=True)
    # Slurm does not create it, and without it a job fails without an error message.
    make_directory(logs_folder(config.output))
    for sentence in [*plan_warnings(plan.summary()), *held_out_warnings(config, plan.spec)]:
        console.print(f"Warning: {sentence}", style="yellow", markup=False, soft_wrap=True)
    if resources.gpus:
        for sentence in [
            *memory_sentences(needed),
            *_time_sentences(config, setups, plan, resources),
        ]:
            console.print(sentence, markup=False, soft_wrap=True)
    return config


def _time_sentences(
    config: RunConfig, setups: Sequence[PhaseSetup], plan: Plan, resources: Resources
) -> list[str]:
    """How long the whole run takes, and how many starts of the job that is."""
    hardware = hardware_of(config)
    if hardware is None:
        return [NO_TIME]
    if config.hardware.gpus_per_node is None:
        hardware = replace(hardware, gpus_per_node=resources.tasks_per_node)
    phases, limit = stage_setups(setups, plan.spec.phases), time_limit(resources)
    sentences = [time_sentence(hardware, phases)]
    if limit is not None:
        best = run_seconds(hardware, phases)
        starts = [math.ceil(each / limit) for each in (best, best / hardware.expected)]
        if starts[1] == 1:
            then = "is enough for all of it"
        else:
            few = f"{starts[0]:,} to {starts[1]:,}" if starts[0] < starts[1] else f"{starts[1]:,}"
            then = f"is enough for a part: the job queues itself again, for {few} starts in all"
        sentences.append(f"The job's time limit of {duration(limit)} {then}")
    return sentences


def _refuse_unwritable(config: RunConfig) -> None:
    """Raise InputError if the output folder cannot be written, before anything else is checked."""
    there = config.output
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(config.where("output"), f"{there} is not a folder", "choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(config.where("output"), f"{there} cannot be written", "choose another")


def script_for(
    config: RunConfig, overrides: Sequence[str], options: Sequence[str], resources: Resources
) -> str:
    """Return the batch script of a run; options: of `megaphase train`."""
    # Not the target of a link, to whose folder relative paths would then be relative.
    run_file = real_path(config.path.parent) / config.path.name
    arguments = [str(run_file), *overrides, *options]
    return batch_script(
        resources,
        f"megaphase-{config.output.name}",
        logs_folder(config.output),
        arguments,
        ending_seconds=ending_seconds(config),
    )


def submit_run(config: RunConfig, script: str) -> SubmittedJob:
    """Submit a run and record its job in the run directory.

    Raises:
        RunError: Slurm refuses.
    """
    number = submit(script)
    return remember_job(config.output, number, logs_folder(config.output) / f"{number}.log")


def logs_folder(run_dir: Path) -> Path:
    """Return the folder for the output of a run's jobs."""
    return real_path(run_dir) / FOLDER
