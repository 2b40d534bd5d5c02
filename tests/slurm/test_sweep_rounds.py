"""`megaphase sweep --slurm`: its scripts and rejected inputs, and whole sweeps on a real Slurm."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster
from data_support import wait_until
from run_support import make_corpora
from sweep_run_support import run_warm, settings, write
from translation_support import random_hashes, write_documents
from typer.testing import CliRunner, Result

from megaphase.cli import app
from megaphase.launch.slurm.job_file import read_job
from megaphase.launch.slurm.requeue import newest_step
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.sweep import load_sweep
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.locks import exclusive_lock

CPU = {"gpus_per_node": 0, "tasks_per_node": 1, "cores": 1, "restarts": 0}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def call(path: Path, *options: object, cluster: Cluster | None = None) -> Result:
    """Run `megaphase sweep` in this process."""
    env = {} if cluster is None else {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    return CliRunner().invoke(app, ["sweep", str(path), *map(str, options)], env=env)


def submit(cluster: Cluster, path: Path, *options: object) -> dict[str, str]:
    """Call it with --slurm; return the ids of the submitted jobs, by step."""
    done = call(path, "--slurm", *options, cluster=cluster)
    assert done.exit_code == 0, done.exception
    lines = [line for line in done.stdout.splitlines() if line.startswith("Submitted: ")]
    return {words[1].rstrip(","): words[3] for words in map(str.split, lines)}


# Scripts and refusals


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        (3, ": slurm: must be a mapping"),
        ({"node": 2}, ": slurm: unknown key 'node'; did you mean 'nodes'?"),
        ({"nodes": 0}, ": slurm.nodes: must be greater than 0; found 0"),
        (
            {"tasks_per_node": 2},
            ": slurm: tasks_per_node applies to nodes without GPUs; add",
        ),
        ({"sbatch": "-p cpu"}, ": slurm: sbatch: '-p' is not an option; write --NAME=VALUE"),
        ({"sbatch": 3}, ": slurm: sbatch: must be a list; found 3"),
        ({"sbatch": "--gpus=8"}, ": slurm: --gpus is not allowed there; use the keys nodes, gpus"),
        ({"next_sbatch": "--array=1"}, ": slurm: next_sbatch: --array is not allowed there"),
    ],
)
def test_a_mistake_is_one_line(slurm: Any, message: str, corpora: Path, tmp_path: Path) -> None:
    path = write(tmp_path, settings(corpora, slurm=slurm))
    with pytest.raises(InputError) as caught:
        load_sweep(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, [], "sweep --slurm: there is no sbatch on this machine; run it on a login node, or"),
        ({}, ["--jobs", 2], "--jobs: --slurm is also given; set it in the sweep file's section"),
        ({}, ["--gpus", 8], "--processes: --slurm is also given; set it in the sweep file's"),
        ({"slurm": None}, ["--dry-run"], "{path}: slurm: --slurm needs this section; give the"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any],
    options: list[object],
    message: str,
    corpora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    path = write(tmp_path, settings(corpora, **{"slurm": CPU, **changes}))
    error = call(path, "--slurm", *options).exception
    assert isinstance(error, InputError)
    assert str(error).startswith(message.format(path=path))


def test_dry_run_prints_the_scripts_of_the_first_round(corpora: Path, tmp_path: Path) -> None:
    arms = {
        "static": {"rates": [0.2, 0.3]},
        "regularized": {"rates": [0.2], "early_stopping": 2},
        "two-phase": {"pretrain": [0.6], "rates": [0.4]},
    }
    jobs = {
        "nodes": 2, "gpus_per_node": 2, "cores": 6, "at_a_time": 3,
        "sbatch": "--partition=gpu --time=2:00:00", "next_sbatch": ["--partition=cpu"],
    }  # fmt: skip
    content = settings(corpora, arms=arms, slurm=jobs)
    content["learning_rate"]["peaks"] = [1e-2, 5e-3]
    done = call(write(tmp_path, content), "--slurm", "--dry-run")
    assert done.exit_code == 0, done.exception
    arrays = ["first-stage", "single-stage", "single-stage-best"]
    heads = [line for line in done.stdout.splitlines() if re.match(r"# \S+, after ", line)]
    assert heads == [
        *(f"# {name}, after nothing" for name in arrays), f"# next, after {', '.join(arrays)}",
    ]  # fmt: skip
    scripts = done.stdout.split("#!/bin/bash\n")[1:]
    for script, tasks in zip(scripts, (2, 4, 2), strict=False):
        for option in (
            f"--array=0-{tasks - 1}%3", "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=6",
            "--partition=gpu", "--time=2:00:00",
        ):  # fmt: skip
            assert f"#SBATCH {option}\n" in script
    assert "#SBATCH --partition=cpu\n" in scripts[3]
    assert scripts[3].rstrip().endswith(f" -m megaphase sweep {tmp_path}/sweep.yaml --slurm")
    # The printed scripts can be inspected, and submitted by hand.
    folder = tmp_path / "out" / "slurm" / "dry-run"
    assert list(yaml.safe_load((folder / "pipeline.yaml").read_text())["steps"])[-1] == "next"
    files = [folder / "first-stage" / f"{task}.yaml" for task in range(2)]
    trained = [Path(yaml.safe_load(file.read_text())["output"]).name for file in files]
    assert trained == ["pretrain-0.6-p0.01-s11", "pretrain-0.6-p0.005-s11"]
    assert [path.name for path in folder.parent.iterdir()] == ["dry-run"]
    # And that is all: other settings may follow.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["slurm"]
    done = call(write(tmp_path, content | {"steps": 12}), "--slurm", "--dry-run")
    assert done.exit_code == 0, done.exception


# On a real Slurm


@pytest.fixture
def break_run() -> Iterator[Callable[[Path], None]]:
    """Let runs fail until the test ends: this process locks their directories."""
    with ExitStack() as held:

        def hold(run: Path) -> None:
            taken = partial(pytest.fail, "somebody else holds the run directory")
            held.enter_context(exclusive_lock(run / ".lock", taken))

        yield hold


def wait_for_the_end(cluster: Cluster, path: Path) -> str:
    """Wait until no job is left; return the state of the last job that was to start a round."""
    wait_until(lambda: not cluster.run("squeue", "--noheader"))
    return cluster.state(next_job(path))


def next_job(path: Path) -> str:
    found = read_job(path.parent / "out")
    assert found is not None
    return found.job


def logs(path: Path) -> str:
    """Return the logs of all jobs, for messages."""
    found = sorted((path.parent / "out" / "slurm").rglob("*.log"))
    return "\n".join(f"--- {log}\n{log.read_text()}" for log in found)


def untimed(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Return outcomes as plain data, without seconds, and without the folder in reasons."""
    plain = {name: outcome.model_dump(exclude={"seconds"}) for name, outcome in outcomes.items()}
    for outcome in plain.values():
        if outcome["failed"] is not None:
            outcome["failed"] = outcome["failed"].partition("/runs/")[2]
    return plain


@pytest.mark.slow
def test_a_sweep_ends_as_on_one_machine(
    cluster: Cluster, corpora: Path, tmp_path: Path, break_run: Callable[[Path], None]
) -> None:
    """Without the job that was to start the second round, with a run that fails, and with losses
    on a test split, which jobs of their own measure."""
    failing = "static-r0.2-p0.01-s11"
    here, there = tmp_path / "here", tmp_path / "a cluster"
    for folder in (here, there):
        folder.mkdir()
        test = {"fraction": 0.25, "samples": 5}
        path = write(folder, settings(corpora, slurm=CPU, test=test))
        break_run(folder / "out" / "runs" / failing)

    jobs = submit(cluster, path)
    assert list(jobs) == ["first-stage", "single-stage", "single-stage-evaluate", "next"]
    again = call(path, "--slurm", cluster=cluster)
    assert f"and job {jobs['next']} after them starts the next round" in again.stdout
    cluster.run("scancel", jobs["next"])
    _, _, expected = run_warm(here / "sweep.yaml")
    wait_until(lambda: not cluster.run("squeue", "--noheader"))

    jobs = submit(cluster, path)
    branch = "pretrain-0.6-p0.01-s11"
    assert list(jobs) == [branch, f"{branch}-evaluate", "next"], logs(path)
    assert wait_for_the_end(cluster, path) == "FAILED"
    directory = SweepDirectory(there / "out")
    assert untimed(directory.outcomes()) == untimed(expected), logs(path)
    assert failing in directory.outcomes()
    assert sum(bool(outcome.test) for outcome in directory.outcomes().values()) == 1
    (last,) = (directory.slurm / "round-002" / "logs").glob("next-*.log")
    assert f"1 of 3 runs have failed: {failing}; the first: " in last.read_text()
    assert "another process is training" in directory.log(failing).read_text()


def write_pairs(prefix: Path, corpora: Path) -> None:
    """Write a corpus of pairs of short sentences."""
    tokenizer = Tokenizer.load(corpora / "tok")
    tag, words = tokenizer.reserved_tags[0], (corpora / "text" / "alda.jsonl").read_text().split()
    pairs = [(" ".join(words[n : n + 2]), words[n + 2]) for n in range(9, 900, 3)]
    documents = [
        [*tokenizer.encode(source), tag, *tokenizer.encode(target), tokenizer.eod]
        for source, target in pairs
    ]
    write_documents(
        prefix,
        documents,
        random_hashes(len(documents), 6),
        tag=tag,
        tokenizer_hash=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
    )


@pytest.mark.slow
def test_rounds_follow_each_other_to_the_scores_of_translations(
    cluster: Cluster, corpora: Path, tmp_path: Path, break_run: Callable[[Path], None]
) -> None:
    arms = {
        "static": {"rates": [0.3]},
        "regularized": {"rates": [0.3], "early_stopping": 2},
        "two-phase": {"pretrain": [0.6], "rates": [0.4]},
    }
    translation = {"samples": 4, "max_tokens": 8, "beam": 1, "batch": 4}
    pairs, here, there = (tmp_path / name for name in ("pairs", "here", "there"))
    write_pairs(pairs, corpora)
    for folder in (here, there):
        folder.mkdir()
        content = settings(
            corpora, arms=arms, high=["alda"], low=["pairs"], translation=translation, slurm=CPU,
            test={"fraction": 0.2, "samples": 6}, training_loss={"samples": 4},
        )  # fmt: skip
        content["learning_rate"]["peaks"] = [1e-2, 5e-3]
        content["run"]["tasks"] = {
            "alda": {"corpus": str(corpora / "data" / "alda")},
            "pairs": {"kind": "translation", "corpus": str(pairs)},
        }
        path = write(folder, content)
        break_run(folder / "out" / "runs" / "pretrain-0.6-p0.005-s11")
    _, _, expected = run_warm(here / "sweep.yaml")
    jobs = submit(cluster, path)
    assert list(jobs) == [
        "first-stage",
        "single-stage", "single-stage-evaluate", "single-stage-translate",
        "single-stage-best", "single-stage-best-evaluate", "single-stage-best-translate",
        "next",
    ]  # fmt: skip
    assert wait_for_the_end(cluster, path) == "FAILED"  # as a run has failed
    found = SweepDirectory(there / "out").outcomes()
    assert untimed(found) == untimed(expected), logs(path)
    assert len(found) == 8
    for measured in ("translation", "test", "training"):
        assert sum(bool(getattr(outcome, measured)) for outcome in found.values()) == 6


@pytest.mark.slow
def test_pruned_chains_of_three_phases_end_as_on_one_machine(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    """Each rung of a comparison is a round, and so is each phase of a chain."""
    three = [
        {"share": 0.5, "rate": 0, "learning_rate": {"schedule": "wsd", "decay": 0.25}},
        {"share": 0.25, "rate": 0.1, "learning_rate": "continue"},
        {"rate": [0.3, 0.5], "learning_rate": "continue"},
    ]
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        content = settings(
            corpora, arms={"static": {"rates": [0.1, 0.3]}, "wsd": {"phases": three}}, steps=32,
            prune="halving", slurm=CPU,
        )  # fmt: skip
        content["learning_rate"]["peaks"] = [1e-4, 1e-2]
        path = write(folder, content)
    _, expected, _ = run_warm(here / "sweep.yaml")
    submit(cluster, path)
    assert wait_for_the_end(cluster, path) == "COMPLETED", logs(path)
    found = SweepDirectory(there / "out")
    assert losses(found.outcomes()) == losses(expected.outcomes()), logs(path)
    assert rungs(found) == rungs(expected)
    assert len(rungs(found)) > 2
    assert "All runs have ended." in call(path, "--slurm", cluster=cluster).stdout


def rungs(directory: SweepDirectory) -> dict[str, str]:
    """Return what was compared, by file."""
    return {file.name: file.read_text() for file in (directory.path / "rungs").iterdir()}


def losses(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {name: (each.failed, each.losses) for name, each in outcomes.items()}


@pytest.mark.slow
def test_stopped_cancelled_and_failed_runs_go_on(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        arms = {"two-phase": {"pretrain": [0.6], "rates": [0.4]}}
        path = write(folder, settings(corpora, arms=arms, steps=200, slurm={**CPU, "restarts": 3}))
    _, _, expected = run_warm(here / "sweep.yaml")
    directory = SweepDirectory(there / "out")
    first = directory.run("pretrain-0.6-p0.01-s11")

    def wait_for_steps(more: int) -> None:
        goal = more + newest_step(first)
        wait_until(lambda: newest_step(first) >= goal)

    # A job that requeues itself has not ended for those that wait for it.
    jobs = submit(cluster, path)
    wait_for_steps(6)
    cluster.run("scancel", "--signal=USR1", f"{jobs['first-stage']}_0")
    cluster.hurry(f"{jobs['first-stage']}_0")
    assert cluster.state(jobs["next"]) == "PENDING"
    wait_for_steps(6)

    # All are cancelled: the same command resumes them.
    cluster.run("scancel", jobs["next"], jobs["first-stage"])
    wait_until(lambda: not cluster.run("squeue", "--noheader"))
    jobs = submit(cluster, path)
    assert list(jobs) == ["first-stage", "next"], logs(path)
    assert not directory.outcomes()
    wait_for_steps(6)

    # One is cancelled: it counts as failed in the next round, until it is retried.
    cluster.run("scancel", jobs["first-stage"])
    assert wait_for_the_end(cluster, path) == "FAILED"
    (outcome,) = directory.outcomes().values()
    assert outcome.failed is not None
    assert "CANCELLED" in outcome.failed
    submit(cluster, path, "--retry")
    assert wait_for_the_end(cluster, path) == "COMPLETED"
    assert losses(directory.outcomes()) == losses(expected), logs(path)
    assert "All runs have ended." in call(path, "--slurm", cluster=cluster).stdout
    assert not cluster.run("squeue", "--noheader")


def test_on_one_machine_no_run_is_begun_that_is_in_the_queue(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, settings(corpora, slurm={**CPU, "sbatch": "--hold"}))
    jobs = submit(cluster, path)
    cluster.run("scancel", jobs["next"])
    local = call(path, cluster=cluster)
    assert isinstance(local.exception, InputError)
    assert f"job {jobs['first-stage']}_0 of this run is pending; wait" in str(local.exception)
    # Only the job that starts the next round is missing.
    assert list(submit(cluster, path)) == ["next"]
    cluster.run("scancel", *jobs.values(), next_job(path))


def test_what_sbatch_refuses_leaves_nothing(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    slurm = {**CPU, "sbatch": "--hold", "next_sbatch": "--partition=nowhere"}
    path = write(tmp_path, settings(corpora, slurm=slurm))
    done = call(path, "--slurm", cluster=cluster)
    assert isinstance(done.exception, RunError)
    assert str(done.exception).startswith("sbatch refused the job: ")
    assert not cluster.run("squeue", "--noheader")
    assert not list((tmp_path / "out" / "runs").iterdir())
    assert not list((tmp_path / "out" / "slurm").iterdir())
