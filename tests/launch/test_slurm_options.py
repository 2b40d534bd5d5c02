"""Options of the batch script, and the time limit that they set."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from megaphase.launch.slurm.pipeline import Step
from megaphase.launch.slurm.script import (
    Resources,
    batch_script,
    check_memory,
    node_options,
    time_limit,
)
from megaphase.sweep.file import ClusterJobs


def resources(*options: str) -> Resources:
    return Resources(nodes=1, tasks_per_node=8, gpus=True, cores=None, options=options)


def test_memory_and_exclusive_nodes_are_in_the_header() -> None:
    options = node_options("480G", exclusive=True)
    text = batch_script(resources(*options), "job", Path("logs"), ["run.yaml"])
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --mem=480G" in header
    assert "#SBATCH --exclusive" in header
    assert node_options(None, exclusive=False) == []


@pytest.mark.parametrize("memory", ["480GB", "-1", "", "all", True])
def test_memory_that_sbatch_would_not_take(memory: object) -> None:
    with pytest.raises(ValueError, match="is no memory; write 480G, or 0"):
        check_memory(memory)
    with pytest.raises(ValidationError, match="is no memory"):
        Step(train="run.yaml", mem=memory)  # type: ignore[arg-type]


def test_the_jobs_of_a_sweep_have_both_where_they_train() -> None:
    jobs = ClusterJobs.model_validate({"mem": 0, "exclusive": True, "sbatch": "--qos=low"})
    assert (jobs.training["mem"], jobs.training["exclusive"]) == ("0", True)
    assert jobs.options == ("--qos=low",)
    step = Step.model_validate({"train": "run.yaml", **jobs.training})
    assert node_options(step.mem, exclusive=step.exclusive) == ["--mem=0", "--exclusive"]


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ((), 24 * 3600),  # the header's own
        (("--time=90",), 90 * 60),
        (("--time=90:30",), 90 * 60 + 30),
        (("--time=1:02:03",), 3723),
        (("--time=2-0",), 2 * 86400),
        (("--time=2-1:30",), 2 * 86400 + 5400),
        (("--time=2-1:30:15",), 2 * 86400 + 5415),
        (("--time=1:00:00", "--qos=low", "--time=2:00:00"), 7200),  # the last one counts
        (("--time=UNLIMITED",), None),
        (("--time=0",), None),
    ],
)
def test_the_time_limit_is_what_slurm_reads(options: tuple[str, ...], seconds: int | None) -> None:
    assert time_limit(resources(*options)) == seconds
