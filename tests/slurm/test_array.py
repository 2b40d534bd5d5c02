"""`data tokenize --slurm`: the scripts, run by bash and by a real Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from data_support import CORPUS_FILES, corpus_bytes, files_of, make_tokenizer, write_jsonl

from megaphase.data_tools.tokenization.tokenize import tokenize


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Make three files in a folder with a space; some documents occur twice."""
    folder = tmp_path / "my text"
    folder.mkdir()
    for i, name in enumerate("abc"):
        write_jsonl(folder / f"{name}.jsonl", [f"{i}: number {n % 70} of many" for n in range(100)])
    return folder


def command(text: Path, tok: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "megaphase", "data", "tokenize", str(text / "*.jsonl"),
        "--tokenizer", str(tok), "--out", str(out), "--slurm", "--tasks", "3", *options,
    ]  # fmt: skip


def run(arguments: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def whole(text: Path, tok: Path, tmp_path: Path) -> Path:
    tokenize(
        sorted(text.iterdir()), tok, tmp_path / "whole" / "en", workers=1, drop_duplicates=True
    )
    return tmp_path / "whole" / "en"


def test_the_scripts_do_what_the_command_was_asked_for(text, tok, whole, tmp_path) -> None:
    out = tmp_path / "out" / "en"
    options = ["--dedup", "--workers", "2", "--sbatch", "--partition=cpu --time=1:00:00"]
    printed = run(command(text, tok, out, *options, "--dry-run"))
    assert printed.returncode == 0, printed.stderr
    array, merge = printed.stdout.split("\n\n")
    for script in (array, merge):
        assert script.startswith("#!/bin/bash\n#SBATCH --job-name=")
        assert "#SBATCH --partition=cpu\n#SBATCH --time=1:00:00\n" in script
    assert "#SBATCH --array=0-2\n#SBATCH --cpus-per-task=2\n" in array
    for task in "201":
        done = run(["bash", "-c", array], env={**os.environ, "SLURM_ARRAY_TASK_ID": task})
        assert done.returncode == 0, done.stderr
    done = run(["bash", "-c", merge])
    assert done.returncode == 0, done.stderr
    assert files_of(out.parent) == CORPUS_FILES
    assert corpus_bytes(out) == corpus_bytes(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "0/3"], "--shard: --slurm chooses the shards itself; leave one out"),
        (["--template", "{"], "--template: '{' has unbalanced braces"),
        (["--tag", "fr"], "--tag: only translation pairs have a tag"),
        (["--tasks", "0"], "--tasks: 0 is not a number of shards; give 2 to 99,999"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(
    text, tok, tmp_path, options, message
) -> None:
    result = run(command(text, tok, tmp_path / "out" / "en", *options))
    assert result.returncode == 2
    assert result.stderr.startswith(f"megaphase: {message}")
    assert not (tmp_path / "out").exists()


def test_without_slurm_it_is_one_line(text, tok, tmp_path) -> None:
    result = run(
        command(text, tok, tmp_path / "out" / "en"), env={**os.environ, "PATH": "/nowhere"}
    )
    assert result.returncode == 2
    assert result.stderr.startswith(
        "megaphase: --slurm: there is no sbatch on this machine; run it"
    )
    assert not (tmp_path / "out").exists()


def test_on_a_real_slurm(cluster: Cluster, text, tok, whole, tmp_path) -> None:
    out = tmp_path / "out" / "en"
    result = run(command(text, tok, out, "--dedup", "--workers", "1"), env=cluster.environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Submitted: array ")
    cluster.wait_for_all()
    logs = {path.name: path.read_text() for path in (out.parent / "en.slurm").iterdir()}
    assert files_of(out.parent) == sorted([*CORPUS_FILES, "en.slurm"]), logs
    assert corpus_bytes(out) == corpus_bytes(whole)
    assert len(logs) == 4


@pytest.mark.slow
def test_a_shard_that_fails_ends_the_chain_and_can_be_mended(
    cluster: Cluster, text, tok, tmp_path
) -> None:
    out = tmp_path / "out" / "en"
    good = (text / "b.jsonl").read_text()
    (text / "b.jsonl").write_text(f"{good}oops\n")
    assert run(command(text, tok, out, "--workers", "1"), env=cluster.environment).returncode == 0
    cluster.wait_for_all()
    assert not Path(f"{out}.json").exists()
    logs = "".join(path.read_text() for path in (out.parent / "en.slurm").iterdir())
    assert "b.jsonl:101: is not valid JSON" in logs
    # Complete shards are kept, and the same command resumes.
    result = run(
        command(text, tok, out, "--workers", "1", "--on-error", "skip"), env=cluster.environment
    )
    assert result.returncode == 0
    cluster.wait_for_all()
    (text / "b.jsonl").write_text(good)
    tokenize(sorted(text.iterdir()), tok, tmp_path / "whole", workers=1)
    found, expected = corpus_bytes(out), corpus_bytes(tmp_path / "whole")
    assert {**found, ".json": b""} == {**expected, ".json": b""}


def test_what_sbatch_refuses_is_one_line(cluster: Cluster, text, tok, tmp_path) -> None:
    options = ["--sbatch", "--partition=nowhere"]
    result = run(command(text, tok, tmp_path / "out" / "en", *options), env=cluster.environment)
    assert result.returncode == 1
    assert result.stderr.startswith("megaphase: sbatch refused the job: ")
    assert "Traceback" not in result.stderr
    assert not cluster.run("squeue", "--noheader")
