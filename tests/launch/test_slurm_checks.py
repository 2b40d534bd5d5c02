"""`launch slurm` refuses before it queues a run what `train` would refuse after it has waited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from run_support import make_corpora, run_settings, write_run_file
from warm_commands import run, run_well

from megaphase.plan.load_plan import open_run, preview_plan
from megaphase.plan.same_run import settings_of

OPTIONS = ("--dry-run", "--nodes", 1, "--gpus-per-node", 0)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def refused_alike(run_file: Path, *arguments: object) -> str:
    """Return the one line with which both commands refuse a run; nothing may be written."""
    before = sorted(run_file.parent.rglob("*"))
    queued = run("launch", "slurm", run_file, *arguments, *OPTIONS)
    assert (queued.returncode, queued.stdout) == (2, ""), queued.stderr
    assert sorted(run_file.parent.rglob("*")) == before
    trained = run("train", run_file, *arguments)
    assert (trained.returncode, trained.stderr) == (2, queued.stderr)
    [line] = queued.stderr.splitlines()
    return line.removeprefix("megaphase: ")


def test_corpora_that_are_not_those_of_the_run(corpora: Path, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, run_settings(corpora))
    config, tokenizer = open_run(run_file, None)
    plan = preview_plan(config, tokenizer).summary()
    # As a start leaves them.
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings_of(config)))
    shutil.rmtree(tmp_path / "run" / "plan")
    assert run_well("launch", "slurm", run_file, *OPTIONS).startswith("#!/bin/bash")
    other = f"tasks.cimri.corpus={corpora / 'data' / 'alda'}"
    assert refused_alike(run_file, other) == (
        f"{run_file}: tasks: the corpora are not those with which the run in {tmp_path / 'run'} "
        "began; put the old ones back or choose another output"
    )


def test_new_tokens_that_no_checkpoint_records(corpora: Path, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, run_settings(corpora))
    line = refused_alike(run_file, "phases.0.trained=new_embeddings")
    assert line.startswith(f"{run_file}: phases[0].trained: is new_embeddings, but the run starts ")


def test_a_tracker_that_cannot_be_used(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    run_file = write_run_file(tmp_path, run_settings(corpora))
    line = refused_alike(
        run_file, "logging={mlflow: {experiment: languages, tracking_uri: 'file:///data/runs'}}"
    )
    assert line.startswith(
        f"{run_file}: logging.mlflow.tracking_uri: file:///data/runs is a folder"
    )


def test_memory_is_that_of_the_card_of_the_run_file(corpora: Path, tmp_path: Path) -> None:
    settings = run_settings(corpora) | {
        "model": {"preset": "gpt-6.7b", "seq_len": 32}, "precision": "bf16",
    }  # fmt: skip
    run_file = write_run_file(tmp_path, settings)
    layout = ("--dry-run", "--nodes", 1, "--gpus-per-node", 2)

    def refused(*arguments: object) -> str:
        said = run("launch", "slurm", run_file, *arguments, *layout)
        assert (said.returncode, said.stdout) == (2, "")
        return said.stderr

    assert "The run does not fit 40 GB: " in refused("hardware={card: a100-40gb}")
    assert "The run does not fit 80 GB: " in refused("hardware={card: h100-sxm}")
    large = "hardware={card: h200-sxm}"
    run_well("launch", "slurm", run_file, large, *layout)
    assert "The run does not fit 80 GB: " in refused(large, "--memory", 80)


def test_processes_of_a_node_are_those_of_its_gpus(corpora: Path, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, run_settings(corpora))
    said = run("launch", "slurm", run_file, "--dry-run", "--nodes", 2, "--tasks-per-node", 4)
    assert said.returncode == 2
    assert said.stderr == (
        "megaphase: --tasks-per-node: applies to nodes without GPUs; add --gpus-per-node 0, or "
        "leave it out\n"
    )


def test_rank_0_may_wait_for_its_trackers(corpora: Path, tmp_path: Path) -> None:
    """The job does not end it meanwhile, since the other ranks have ended."""
    logging = {
        "mlflow": {"experiment": "languages", "tracking_uri": "http://a", "wait_seconds": 300},
        "wandb": {"project": "languages", "mode": "offline"},
    }  # fmt: skip
    settings = run_settings(corpora, faults={"silent_seconds": 20}, logging=logging)
    script = run_well("launch", "slurm", write_run_file(tmp_path, settings), *OPTIONS)
    assert "\npatience=365\n" in script
