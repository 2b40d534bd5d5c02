"""What becomes of arrays with more tasks than a real Slurm takes: here three."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, start_cluster
from data_support import make_tokenizer, write_jsonl
from run_support import make_corpora, megaphase
from sweep_run_support import settings, write

from megaphase.launch.slurm.job_file import read_job
from megaphase.sweep.directory import SweepDirectory
from megaphase.utils import slurm

MOST = 3
PROBLEM = f"4 tasks, but this cluster's arrays take at most {MOST} (MaxArraySize, max_array_tasks)"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with start_cluster(tmp_path_factory.mktemp("slurm"), MaxArraySize=MOST) as running:
        yield running


def call(cluster: Cluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        megaphase(*arguments), env=cluster.environment, capture_output=True, text=True, check=False
    )


def test_the_limit_is_the_one_that_sbatch_has(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    assert slurm.max_array_size() == MOST
    job = cluster.submit("true", "--hold", f"--array=0-{MOST - 1}")
    cluster.run("scancel", job)
    with pytest.raises(AssertionError, match="Invalid job array specification"):
        cluster.submit("true", "--hold", f"--array=0-{MOST}")


def test_a_pipeline_is_refused_before_its_first_job(cluster: Cluster, tmp_path: Path) -> None:
    steps = {
        "first": {"command": "data verify en"},
        "few": {"command": "data verify en-%task", "after": "first", "array": MOST},
        "many": {"command": "data verify en-%task", "after": "first", "array": MOST + 1},
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"steps": steps, "sbatch": "--hold"}))
    done = call(cluster, "launch", "slurm", "--pipeline", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"megaphase: {path}: steps.many.array: {PROBLEM}; split the step\n"
    assert not cluster.run("squeue", "--noheader")
    assert list(tmp_path.iterdir()) == [path]
    del steps["many"]
    path.write_text(yaml.safe_dump({"steps": steps, "sbatch": "--hold"}))
    done = call(cluster, "launch", "slurm", "--pipeline", path)
    assert done.returncode == 0, done.stderr
    cluster.run("scancel", "--state=PENDING")


def test_shards_are_refused_before_the_first_job(cluster: Cluster, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "en.jsonl", [f"number {n}" for n in range(90)])
    tok = make_tokenizer(tmp_path)
    command = ["data", "tokenize", text, "--tokenizer", tok, "--out", tmp_path / "out" / "en"]
    done = call(cluster, *command, "--slurm", "--tasks", MOST + 1)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"megaphase: --tasks: {PROBLEM}; pass --tasks {MOST}, or fewer\n"
    assert not cluster.run("squeue", "--noheader")
    assert not (tmp_path / "out").exists()


def test_a_sweep_has_as_many_arrays_as_it_needs(cluster: Cluster, tmp_path: Path) -> None:
    """Each run is a task of one of them, and is measured by one of the array behind that."""
    jobs = {"gpus_per_node": 0, "tasks_per_node": 1, "sbatch": "--hold"}
    rates = [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]
    path = write(
        tmp_path,
        settings(
            make_corpora(tmp_path / "corpora"),
            arms={"static": {"rates": rates}},
            test={"fraction": 0.25, "samples": 5},
            slurm=jobs,
        ),
    )
    planned = call(cluster, "sweep", path, "--slurm", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    arrays = ["single-stage", "single-stage-2", "single-stage-3"]
    names = [each for name in arrays for each in (name, f"{name}-evaluate")]
    assert re.findall(r"(?m)^# (\S+), after ", planned.stdout) == [*names, "next"]
    assert re.findall("--array=(.*)", planned.stdout) == ["0-2"] * 4 + ["0-0"] * 2

    done = call(cluster, "sweep", path, "--slurm")
    assert done.returncode == 0, done.stderr
    submitted = dict(re.findall(r"(?m)^Submitted: (\S+), job (\S+)$", done.stdout))
    assert list(submitted) == [*names, "next"]
    folder = tmp_path / "out" / "slurm" / "round-001"
    tasks = [(name, task) for name in arrays for task in range(MOST)][: len(rates)]
    runs = []
    for name, task in tasks:
        run = Path(yaml.safe_load((folder / name / f"{task}.yaml").read_text())["output"])
        job = read_job(run)
        assert job is not None
        assert job.job == f"{submitted[name]}_{task}"
        measured = SweepDirectory(tmp_path / "out").losses_file(run.name)
        assert measured.resolve() == folder / name / f"{task}-evaluate.json"
        runs.append(run.name)
    assert runs == [f"static-r{rate}-p0.01-s11" for rate in rates]
    queued = cluster.run("squeue", "--noheader", "--array", "--format=%i").split()
    assert {f"{submitted[name]}_{task}" for name, task in tasks} < set(queued)
    assert len(queued) == 2 * len(rates) + 1
    cluster.run("scancel", "--state=PENDING")
