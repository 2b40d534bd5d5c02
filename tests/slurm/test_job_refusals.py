"""Submissions rejected by `megaphase launch slurm`: one line with the reason, nothing submitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from data_support import files_of
from run_support import make_corpora, write_run_file
from train_job_support import LAYOUT, launch_slurm, settings

from megaphase.config.load import load_run_file


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module", autouse=True)
def full(cluster: Cluster) -> str:
    """Submit a job that takes all nodes, so that those of the tests wait."""
    return cluster.submit("srun sleep 600", "--nodes=2", "--exclusive")


def refused(
    cluster: Cluster, run_file: Path, *options: object, layout: list[object] = LAYOUT, code: int = 2
) -> str:
    """Return the one line of a rejected submission; check that nothing is in the queue."""
    queue = cluster.run("squeue", "--noheader", "--format=%i")
    done = launch_slurm(run_file.parent, cluster.environment, run_file, *layout, *options)
    assert (done.returncode, done.stdout) == (code, "")
    assert cluster.run("squeue", "--noheader", "--format=%i") == queue
    said = done.stderr.splitlines()
    # Of the small corpora few documents are held out, which is warned of before.
    warnings, [line] = said[:-1], said[-1:]
    assert all(each.startswith("Warning: ") and "validation loss" in each for each in warnings)
    assert line.startswith("megaphase: ")
    return line.removeprefix("megaphase: ").strip()


def wrong_key(found: dict[str, Any]) -> None:
    found["model"]["layer"] = found["model"].pop("layers")


def wrong_corpus(found: dict[str, Any]) -> None:
    found["tasks"]["alda"]["corpus"] += "-x"


def wrong_tokenizer(found: dict[str, Any]) -> None:
    found["tokenizer"] += "-x"


def wrong_batch(found: dict[str, Any]) -> None:
    found["batch"] = {"samples": 9, "micro": 3}


def wrong_ramp(found: dict[str, Any]) -> None:
    """Which begins in the second phase; when, is known only with the corpora."""
    ramp = {"from": 2, "step": 2, "tokens": 100_000}
    found["batch"] = {"samples": 8, "micro": 2, "ramp": ramp}
    first = found["phases"][0]
    del first["steps"]
    first |= {"epochs": {"alda": 0.05}, "batch": {"samples": 8}}


def wrong_heads(found: dict[str, Any]) -> None:
    found["parallel"]["tensor"] = 4


def wrong_name(found: dict[str, Any]) -> None:
    found["output"] = "50%j"


def wrong_output(found: dict[str, Any]) -> None:
    found["output"] = "run.yaml/run"


@pytest.mark.parametrize(
    ("mistake", "problem"),
    [
        (wrong_key, "run.yaml: model: unknown key 'layer'; did you mean 'layers'?"),
        (wrong_corpus, "data/alda-x.json: no such file; make the corpus with `megaphase data "),
        (wrong_tokenizer, "tok-x: no such file or directory; give another, or make one"),
        (wrong_batch, "run.yaml: batch.samples: 9 is not a multiple of 2 data-parallel ranks × "),
        (wrong_ramp, "batch.ramp: 2 samples, the batch of joint from its step 1 on, is not a mult"),
        (wrong_heads, "run.yaml: model.kv_heads: parallel.tensor 4 does not divide kv_heads 2; "),
        (wrong_name, "a run/50%j/slurm as a pattern; choose a path without it"),
        (wrong_output, "a run/run.yaml is not a folder; choose another"),
    ],
)
def test_a_run_that_cannot_begin(
    cluster: Cluster,
    corpora: Path,
    tmp_path: Path,
    mistake: Callable[[dict[str, Any]], None],
    problem: str,
) -> None:
    found = settings(corpora)
    mistake(found)
    run_file = write_run_file(tmp_path / "a run", found)
    assert problem in refused(cluster, run_file)
    assert files_of(run_file.parent) == ["run.yaml", "stderr", "stdout"]


def test_a_run_that_does_not_divide_the_processes(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    run_file = write_run_file(tmp_path, settings(corpora))
    layout = ["--nodes", 1, "--gpus-per-node", 0, "--tasks-per-node", 3]
    assert refused(cluster, run_file, layout=layout).startswith(
        f"{run_file}: parallel.tensor: 2 does not divide the 3 processes of this run; "
    )
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_its_gpus(cluster: Cluster, corpora: Path, tmp_path: Path) -> None:
    found = settings(corpora)
    found |= {"model": {"preset": "gpt-1.3b", "seq_len": 32}, "precision": "bf16"}
    run_file = write_run_file(tmp_path, found)
    layout = ["--nodes", 1, "--gpus-per-node", 8, "--memory", 1]
    line = refused(cluster, run_file, layout=layout)
    assert line.startswith(f"{run_file}: parallel: The run does not fit 1 GB: ")
    assert not (tmp_path / "run").exists()


def test_a_run_in_the_output_of_another(cluster: Cluster, corpora: Path, tmp_path: Path) -> None:
    found = settings(corpora)
    run_file = write_run_file(tmp_path, found)
    (tmp_path / "run").mkdir()
    resolved = load_run_file(run_file).model_dump(mode="json", exclude_none=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps(resolved))
    line = refused(cluster, run_file, "seed=12")
    assert line == (
        f"{run_file}: seed: is 12, but the run in {tmp_path / 'run'} began with 11; put the old "
        "value back or choose another output"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_a_run_that_is_in_the_queue_already(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    run_file = write_run_file(tmp_path, settings(corpora))
    done = launch_slurm(tmp_path, cluster.environment, run_file, *LAYOUT)
    assert done.returncode == 0, done.stderr
    job = done.stdout.splitlines()[0].split()[-1]
    assert refused(cluster, run_file) == (
        f"{tmp_path / 'run'}: job {job} of this run is pending; wait for it, or end it with "
        f"`scancel {job}`"
    )
    cluster.run("scancel", job)
    done = launch_slurm(tmp_path, cluster.environment, run_file, *LAYOUT)
    assert done.returncode == 0, done.stderr
    cluster.run("scancel", "--state=PENDING")


def test_what_sbatch_refuses(cluster: Cluster, corpora: Path, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, settings(corpora))
    line = refused(cluster, run_file, "--partition", "nowhere", code=1)
    assert line.startswith("sbatch refused the job: ")
    assert "invalid partition specified: nowhere" in line
    line = refused(cluster, run_file, "--sbatch", "--licenses=none-such", code=1)
    assert "Invalid license specification" in line
    assert not (tmp_path / "run" / "slurm" / "job.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-p gpu", "'-p' is not an option; write --NAME=VALUE, or --NAME"),
        ("--qos high", "'high' is not an option; write --NAME=VALUE, or --NAME"),
        ("--comment='oh", "cannot be parsed (No closing quotation); check quotes"),
        ("--nodes=3", "--nodes is not allowed there; use --nodes"),
    ],
)
def test_options_of_sbatch_that_make_no_sense(
    cluster: Cluster, corpora: Path, tmp_path: Path, options: str, message: str
) -> None:
    run_file = write_run_file(tmp_path, settings(corpora))
    assert refused(cluster, run_file, "--sbatch", options) == f"--sbatch: {message}"
    assert not (tmp_path / "run").exists()


def test_without_slurm(tmp_path: Path) -> None:
    for arguments, message in (
        (["run.yaml"], "launch slurm: there is no sbatch on this machine; run it on a login node,"),
        (["--dry-run"], "launch slurm: there is no run file; give one, or --pipeline"),
        (["run.yaml", "--dry-run"], "run.yaml: no such file; give the path of a run file"),
    ):
        done = launch_slurm(tmp_path, {"PATH": "/nowhere"}, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"megaphase: {message}")
        assert done.stderr.count("\n") == 1
