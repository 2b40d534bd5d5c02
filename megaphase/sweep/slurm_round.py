"""The jobs of one round of a sweep on SLURM: arrays that train runs and measure them, and the job
that starts the next round."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from megaphase.launch.slurm.pipeline import Pipeline, load_pipeline
from megaphase.launch.slurm.script import gpus_option
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.file import ClusterJobs
from megaphase.sweep.measurements import Measurement, measurements
from megaphase.sweep.planning.pruning import PendingRun
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trial_run import train_arguments
from megaphase.sweep.trials import Trial
from megaphase.utils.files import atomic_write_text, make_directory, real_path
from megaphase.utils.slurm import USUAL_ARRAY_SIZE, max_array_size

NEXT = "next"
PIPELINE_FILE = "pipeline.yaml"

Groups = Mapping[str, Sequence[PendingRun]]
"""The runs that one array trains, with the same command except for the run file, by array name."""


def array_size() -> int:
    """Return how many runs an array may train."""
    return max_array_size() or USUAL_ARRAY_SIZE


def groups_of(pending_runs: Sequence[PendingRun], most: int) -> Groups:
    """Group runs that are started and measured in the same way, at most so many in a group."""
    groups: dict[str, list[PendingRun]] = {}
    for pending in pending_runs:
        trial, end_after = pending
        name = trial.source or ("single-stage" if trial.is_final else "first-stage")
        if trial.source is not None and not trial.is_final:
            name += "-first-stage"
        name += "" if end_after is None else f"-to-{end_after}"
        name += "-best" if trial.takes_best else ""
        name += "-average" if trial.takes_average else ""
        # The checkpoint that is measured has the name of the last phase.
        phase = trial.phases[-1]["name"]
        if name in groups and groups[name][0].trial.phases[-1]["name"] != phase:
            name += f"-{phase}"
        groups.setdefault(name, []).append(pending)
    return _split(groups, most)


def _split(groups: Groups, most: int) -> Groups:
    """Split larger groups; the further parts of `first-stage` are `first-stage-2` and so on."""
    parts: dict[str, Sequence[PendingRun]] = {}
    for name, members in groups.items():
        numbered = (f"{name}-{number}" for number in count(2))
        names = chain([name], (each for each in numbered if each not in groups))
        for start in range(0, len(members), most):
            parts[next(names)] = members[start : start + most]
    return parts


def write_round(
    sweep: Sweep,
    directory: SweepDirectory,
    jobs: ClusterJobs,
    groups: Groups,
    folder: Path,
    program: Any,
    *,
    write_run_file: Callable[[Trial, Path], None],
) -> Pipeline:
    """Write the pipeline that trains runs, and the files that it names, into its folder.

    write_run_file: makes the file of this path the run file of a run.
    """
    for name, members in groups.items():
        make_directory(folder / name)
        for task, (trial, _) in enumerate(members):
            write_run_file(trial, folder / name / f"{task}.yaml")
    content = {"logs": "logs", "steps": steps_of(sweep, directory, jobs, groups, folder)}
    make_directory(folder)
    atomic_write_text(folder / PIPELINE_FILE, yaml.safe_dump(content, sort_keys=False))
    return load_pipeline(folder / PIPELINE_FILE, program)


def result_name(measurement: Measurement, task: int | str) -> str:
    return f"{task}-{measurement.name}.json"


def make_link(link: Path, target: Path) -> None:
    """Make a relative link to a file that may not exist yet."""
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent))


def steps_of(
    sweep: Sweep, directory: SweepDirectory, jobs: ClusterJobs, groups: Groups, folder: Path
) -> dict[str, dict[str, Any]]:
    """Return the steps of a round; the last one calls `megaphase sweep` again."""
    steps: dict[str, dict[str, Any]] = {}
    for name, members in groups.items():
        (trial, end_after), run_file = members[0], Path(name, "%task.yaml")
        array: dict[str, Any] = {"array": len(members)}
        if jobs.at_a_time is not None:
            array["at_a_time"] = jobs.at_a_time
        train = train_arguments(directory, trial, run_file, 1, end_after)
        steps[name] = {"train": shlex.join(train[1:]), **array, **jobs.training}
        for each in measurements(sweep, trial) if end_after is None else ():
            result = folder / name / result_name(each, "%task")
            command = each.arguments(sweep, trial, run_file, result)
            steps[f"{name}-{each.name}"] = {
                "command": shlex.join(command),
                **array,
                "after": [name],
                "after_failures": True,
                **_of_one_process(jobs),
            }
    # Not the target of a link, to whose folder relative paths would then be relative.
    again = ["sweep", str(real_path(sweep.file.parent) / sweep.file.name), "--slurm"]
    steps[NEXT] = {"command": shlex.join(again), "sbatch": list(jobs.next_options)}
    if groups:
        steps[NEXT] |= {"after": [name for name in steps if name != NEXT], "after_failures": True}
    return steps


def _of_one_process(jobs: ClusterJobs) -> dict[str, Any]:
    """Return the resources of a measurement: those of one process of the run."""
    gpu = [f"--gpus-per-node={gpus_option(1, jobs.gpu_type)}"] if jobs.gpus_per_node else []
    cores = {} if jobs.cores is None else {"cores": jobs.cores}
    return {"sbatch": [*jobs.options, *gpu], **cores}
