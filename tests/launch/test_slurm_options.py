"""Options of the batch script, and the time limit that they set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from run_support import run_settings
from sweep_support import sweep_of
from typer.main import get_command

from megaphase.cli import app
from megaphase.config.load import load_run_file
from megaphase.launch.slurm.pipeline import Step, load_pipeline
from megaphase.launch.slurm.script import (
    DETERMINED,
    Resources,
    batch_script,
    check_memory,
    node_options,
    time_limit,
)
from megaphase.launch.slurm.submit import script_for
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.file import ClusterJobs
from megaphase.sweep.slurm_round import _of_one_process, steps_of
from megaphase.utils.errors import InputError
from megaphase.utils.slurm import sbatch_options


def resources(*options: str) -> Resources:
    return Resources(nodes=1, tasks_per_node=8, gpus=True, cores=None, options=options)


def test_memory_and_exclusive_nodes_are_in_the_header() -> None:
    options = node_options("480G", exclusive=True)
    text = batch_script(resources(*options), "job", Path("logs"), ["run.yaml"])
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --mem=480G" in header
    assert "#SBATCH --exclusive" in header
    assert node_options(None, exclusive=False) == []


def test_the_type_of_the_gpus_is_in_the_header_of_jobs_and_measurements() -> None:
    text = batch_script(replace(resources(), gpu_type="a100"), "job", Path("logs"), ["run.yaml"])
    assert "#SBATCH --gpus-per-node=a100:8\n" in text
    jobs = ClusterJobs.model_validate({"gpus_per_node": 4, "gpu_type": "a100-80"})
    assert (jobs.training["gpu_type"], _of_one_process(jobs)["sbatch"]) == (
        "a100-80",
        ["--gpus-per-node=a100-80:1"],
    )
    with pytest.raises(ValidationError, match="a:8 is no type of GPU; write a name that `sinfo"):
        Step(train="run.yaml", gpu_type="a:8")
    with pytest.raises(ValidationError, match="gpu_type applies to nodes with GPUs; leave it out"):
        Step(train="run.yaml", gpus_per_node=0, gpu_type="a100")


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


@pytest.mark.parametrize("name", ["output", "error", "open-mode", "chdir", "no-requeue"])
def test_where_a_job_writes_and_whether_it_comes_back_is_not_for_sbatch(name: str) -> None:
    option = "--no-requeue" if name == "no-requeue" else f"--{name}=mine"
    with pytest.raises(InputError, match=f"--{name} is not allowed there; leave it out"):
        sbatch_options(option, DETERMINED)
    with pytest.raises(ValidationError, match=f"--{name} is not allowed there; leave it out"):
        ClusterJobs.model_validate({"sbatch": option})


def test_a_job_reads_a_linked_file_where_the_link_is(tmp_path: Path) -> None:
    """Relative paths in it are relative to that folder."""
    (tmp_path / "templates").mkdir()
    here = tmp_path / "here"
    here.mkdir()
    content = {"pipeline": {"steps": {"a": {"command": "doctor"}}}, "languages": {}}
    content["run"] = run_settings(tmp_path / "corpora")
    for name, each in content.items():
        (tmp_path / "templates" / f"{name}.yaml").write_text(yaml.safe_dump(each))
        (here / f"{name}.yaml").symlink_to(f"../templates/{name}.yaml")
    config = load_run_file(here / "run.yaml")
    script = script_for(config, [], [], resources())
    assert f"run=({here / 'run.yaml'})" in script.splitlines()
    pipeline = load_pipeline(here / "pipeline.yaml", get_command(app))
    assert pipeline.folder == here
    sweep = sweep_of(here / "sweep", {"static": {"rates": [0.1]}}, slurm={"gpus_per_node": 0})
    assert sweep.config.slurm is not None
    steps = steps_of(sweep, SweepDirectory(here / "sweep"), sweep.config.slurm, {}, here)
    assert steps["next"]["command"] == f"sweep {here / 'languages.yaml'} --slurm"


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
