"""`launch slurm --pipeline`: valid and invalid files, the scripts, and a chain on a real Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster
from data_support import corpus_bytes
from run_support import make_corpora, megaphase, read_rows, run_settings, write_run_file

from megaphase.cli import app
from megaphase.launch.slurm.command_line import filled
from megaphase.launch.slurm.job_file import read_job
from megaphase.launch.slurm.pipeline import load_pipeline, scripts
from megaphase.utils.errors import InputError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pipeline" / "pipeline.yaml"
CPU = {"gpus_per_node": 0, "tasks_per_node": 2, "cores": 1}


def program() -> Any:
    from typer.main import get_command

    return get_command(app)


def write(folder: Path, steps: Any, **keys: Any) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"steps": steps, **keys}, sort_keys=False))
    return path


def call(
    path: Path, *options: object, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = megaphase("launch", "slurm", "--pipeline", path, *options)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def jobs_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the printed job ids by step."""
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("Submitted: ")]
    return {words[1].rstrip(","): words[3] for words in map(str.split, lines)}


def small_run(folder: Path, corpora: Path, **changes: Any) -> Path:
    """Write a run file of three steps on one language."""
    settings = run_settings(corpora, **changes)
    phase = {**settings["phases"][0], "steps": 3, "mixture": {"rates": {"alda": 1.0}}}
    return write_run_file(folder, {**settings, "phases": [phase]})


# Valid and invalid files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_run(tmp_path, tmp_path)
    return tmp_path


VERIFY = {"command": "data verify en"}
TRAIN = {"train": "run.yaml", **CPU}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({}, ": steps: must hold at least one entry; found an empty mapping"),
        ([], ": steps: must be a mapping"),
        ({"a": {}}, ": steps.a: give either command or train"),
        ({"a": {**VERIFY, **TRAIN}}, ": steps.a: give either command or train"),
        ({"a": {"comand": "x"}}, ": steps.a: unknown key 'comand'; did you mean 'command'?"),
        ({"a": {"command": 3}}, ": steps.a.command: must be text"),
        ({"a": {**VERIFY, "nodes": 2}}, ": steps.a: nodes applies to train only; leave it out"),
        ({"a": {**VERIFY, "array": 0}}, ": steps.a.array: must be greater than 0; found 0"),
        ({"a": {**VERIFY, "at_a_time": 2}}, ": steps.a: at_a_time applies to an array only;"),
        (
            {"a": {**VERIFY, "after_failures": True}},
            ": steps.a: after_failures has no effect",
        ),
        ({"a": {**VERIFY, "cores": "4"}}, ': steps.a.cores: must be a whole number; found "4"'),
        ({"a b": VERIFY}, ": steps: the name 'a b' contains ' '; use letters, digits"),
        (
            {"verify": VERIFY, "b": {**VERIFY, "after": "verfy"}},
            ": steps.b.after: no step 'verfy'; did you mean 'verify'?",
        ),
        (
            {
                "last": {**VERIFY, "after": "a"},
                "a": {**VERIFY, "after": ["good", "b"]},
                "b": {**VERIFY, "after": "a"},
                "good": VERIFY,
            },
            ": steps.a.after: the steps wait for each other in a circle: a, b; leave one out",
        ),
        ({"a": {**VERIFY, "after": "a"}}, ": steps.a.after: the steps wait for each other"),
        (
            {"a": {**VERIFY, "sbatch": "-p cpu"}},
            ": steps.a.sbatch: '-p' is not an option; write --NAME=VALUE, or --NAME",
        ),
        (
            {"a": {**VERIFY, "sbatch": ["--array=0-3"]}},
            ": steps.a.sbatch: --array is not allowed there; use the key array",
        ),
        (
            {"a": {**VERIFY, "sbatch": "--comment='x"}},
            ": steps.a.sbatch: cannot be parsed (No closing quotation); check quotes",
        ),
        (
            {"a": {**VERIFY, "sbatch": "--output=mine-%j.log"}},
            ": steps.a.sbatch: --output is not allowed there; leave it out: the log is where",
        ),
        (
            {"a": {**TRAIN, "sbatch": "--no-requeue"}},
            ": steps.a: --no-requeue is not allowed there; leave it out; --restarts (restarts)",
        ),
        (
            {"a": {**TRAIN, "sbatch": "--gpus=8"}},
            ": steps.a: --gpus is not allowed there; use the keys nodes, gpus_per_node",
        ),
        (
            {"a": {"command": "data verfy en"}},
            ": steps.a.command: No such command 'verfy'. Did you mean 'verify'?; "
            "see `megaphase data --help`",
        ),
        (
            {"a": {"command": "data verify"}},
            ": steps.a.command: Missing argument 'PREFIX'; see `megaphase data verify --help`",
        ),
        (
            {"a": {"command": "data verify en --fast"}},
            ": steps.a.command: No such option: --fast; see `megaphase data verify --help`",
        ),
        ({"a": {"command": "data"}}, ": steps.a.command: something is missing after it; see"),
        ({"a": {"command": ""}}, ": steps.a.command: something is missing after it; see"),
        ({"a": {"command": "data verify 'en"}}, ": steps.a.command: cannot be parsed (No"),
        ({"a": {"command": "megaphase plan run.yaml"}}, ": steps.a.command: begins with megaphase"),
        ({"a": {"command": "data verify en\nplan x"}}, ": steps.a.command: has more than one line"),
        ({"a": {"command": "plan --help"}}, ": steps.a.command: only shows help; leave"),
        (
            {"a": {"command": "data verify en-%task"}},
            ": steps.a.command: %task has no value; add array: N to the step",
        ),
        ({"a": {"train": ""}}, ": steps.a.train: Missing argument 'RUN_FILE'; see"),
        ({"a": {"train": "run.yaml 'x"}}, ": steps.a.train: "),
        ({"a": {"train": "none.yaml"}}, "/none.yaml: no such file; give the path of a run file"),
        ({"a": {"train": "run.yaml sed=3"}}, "run.yaml: unknown key 'sed'; did you mean 'seed'?"),
        (
            {"a": {**TRAIN, "tasks_per_node": 3}},
            "run.yaml: batch.samples: 8 is not a multiple of 3 data-parallel",
        ),
        (
            {"a": {"train": "run.yaml", "tasks_per_node": 2}},
            ": steps.a: tasks_per_node applies to nodes without GPUs; add gpus_per_node: 0",
        ),
        (
            {"a": TRAIN, "b": TRAIN},
            "is trained twice; give each run its own output",
        ),
        (
            {"a": {**TRAIN, "train": "run.yaml seed=%task", "array": 2}},
            "is trained twice; give each run its own output",
        ),
        (
            {"a": {**TRAIN, "train": "%task.yaml", "array": 2}},
            "/0.yaml: no such file; give the path of a run file",
        ),
    ],
)
def test_a_mistake_is_one_line(folder: Path, steps: Any, message: str) -> None:
    path = write(folder, steps)
    with pytest.raises(InputError) as error:
        load_pipeline(path, program())
    line = str(error.value)
    assert line.startswith(f"{path}: steps")
    assert message in line
    assert "\n" not in line
    assert sorted(folder.iterdir()) == [path, folder / "run.yaml"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--nodes", 2], "nodes is also given; put it into the file"),
        (["run.yaml"], "run_file is also given; put it into the file"),
    ],
)
def test_the_command_line_adds_nothing(folder: Path, given: list[object], message: str) -> None:
    path = write(folder, {"a": VERIFY})
    done = call(path, "--dry-run", *given)
    assert done.returncode == 2
    assert done.stderr == f"megaphase: --pipeline {path}: {message}\n"


def test_logs_whose_path_is_a_pattern_are_refused(folder: Path) -> None:
    path = write(folder, {"a": VERIFY}, logs="50%j")
    done = call(path, "--dry-run")
    assert done.returncode == 2
    problem = f"logs: Slurm reads % in {folder}/50%j as a pattern; choose a path without it"
    assert done.stderr == f"megaphase: {path}: {problem}\n"


def test_without_slurm_it_is_one_line(folder: Path) -> None:
    done = call(write(folder, {"a": VERIFY}), env={**os.environ, "PATH": "/nowhere"})
    assert done.returncode == 2
    assert done.stderr.startswith("megaphase: launch slurm: there is no sbatch on this machine; ")


# Its scripts


@pytest.mark.parametrize(
    "line",
    ["a-%task/%tasks.txt", "'a b-%task'/%tasks.txt", '"a\' %task" %tasks_x', r"\'%task %taskx"],
)
def test_the_number_of_a_task_is_filled_in_within_quotes_too(line: str) -> None:
    script = f"N=7; printf '%s\\n' {filled(line, '${N}', 9)}"
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    plain = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True
    )
    expected = plain.stdout.replace("%taskx", "X").replace("%tasks", "9").replace("%task", "7")
    assert printed.stdout == expected.replace("X", "%taskx")


def test_dry_run_prints_scripts_that_bash_reads(folder: Path) -> None:
    steps = {
        "b": {**TRAIN, "after": ["a"], "sbatch": "--time=2:00:00 --qos=high"},
        "a": {"command": "data verify 'my %task'", "array": 3, "sbatch": ["--mem=1G"]},
    }
    done = call(write(folder, steps, sbatch="--partition=cpu --time=10:00"), "--dry-run")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("# b, after a\n")
    assert first.startswith("# a, after nothing\n#!/bin/bash\n")
    header = [line for line in first.splitlines() if line.startswith("#SBATCH")]
    for option in (
        "--array=0-2", "--mem=1G", "--partition=cpu", "--time=10:00", f"--chdir={folder}",
        f"'--output={folder}/logs/a-%A_%a.log'",
    ):  # fmt: skip
        assert f"#SBATCH {option.strip(chr(39))}" in [line.replace("'", "") for line in header]
    assert (
        f"exec {sys.executable} -P -m megaphase data verify 'my '${{SLURM_ARRAY_TASK_ID}}''"
        in first
    )
    for line in ("--time=2:00:00", "--qos=high", f"--chdir={folder}", "--ntasks-per-node=2"):
        assert f"#SBATCH {line}\n" in second
    assert "--time=10:00" not in second
    for script in (first, second):
        checked = subprocess.run(
            ["bash", "-n"], input=script, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["pipeline.yaml", "run.yaml"]


def test_a_sweep_trains_a_run_file_in_each_task(folder: Path) -> None:
    for number in range(2):
        small_run(folder / "runs", folder, output=f"out-{number}").rename(
            folder / "runs" / f"{number}.yaml"
        )
    step = {**TRAIN, "train": "runs/%task.yaml optimizer.weight_decay=0.%task", "array": 2}
    pipeline = load_pipeline(write(folder, {"sweep": step}), program())
    script = scripts(pipeline)["sweep"]
    assert "#SBATCH --array=0-1\n" in script
    (line,) = [line for line in script.splitlines() if line.startswith("run=")]
    given = f"SLURM_ARRAY_TASK_ID=1; {line}; echo ${{run[@]}}"
    printed = subprocess.run(["bash", "-c", given], capture_output=True, text=True, check=True)
    assert printed.stdout == f"{folder}/runs/1.yaml optimizer.weight_decay=0.1\n"


def test_options_of_a_training_are_handed_on(folder: Path) -> None:
    line = "run.yaml seed=3 --from runs/base@pretrain --profile --profile-steps 5"
    script = scripts(load_pipeline(write(folder, {"a": {**TRAIN, "train": line}}), program()))["a"]
    (given,) = [line for line in script.splitlines() if line.startswith("run=")]
    assert given == f"run=({folder}/{line})"


def test_the_example(tmp_path: Path) -> None:
    found = scripts(load_pipeline(EXAMPLE, program()))
    assert list(found)[-3:] == ["plan", "train", "report"]
    assert "#SBATCH --nodes=4\n#SBATCH --gpus-per-node=8\n" in found["train"]


# On a real Slurm


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make corpora in a single process."""
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def test_from_text_to_report(cluster: Cluster, corpora: Path, tmp_path: Path) -> None:
    project = tmp_path / "a project"
    small_run(
        project, corpora, tasks={"alda": {"corpus": "data/alda"}}, output="run",
    )  # fmt: skip
    (text,) = (corpora / "text").glob("alda*")
    shard = f"data tokenize {text} --tokenizer {corpora}/tok --out data/alda --workers 1"
    steps = {
        "report": {"command": "report run --out report", "after": "train"},
        "tokenize": {"command": f"{shard} --shard %task/%tasks", "array": 3},
        "merge": {"command": "data merge --shards --out data/alda", "after": ["tokenize"]},
        "verify": {"command": "data verify data/alda", "after": "merge"},
        "plan": {"command": "plan run.yaml", "after": "verify"},
        "train": {**TRAIN, "after": "plan"},
    }
    jobs = jobs_of(call(write(project, steps), env=cluster.environment))
    assert list(jobs) == ["tokenize", "merge", "verify", "plan", "train", "report"]
    assert read_job(project / "run").job == jobs["train"]
    second = call(project / "pipeline.yaml", env=cluster.environment)
    assert second.returncode == 2
    assert f"job {jobs['train']} of this run is pending; wait for it, or end it" in second.stderr
    cluster.wait_for(jobs["report"], "COMPLETED")
    assert corpus_bytes(project / "data" / "alda") == corpus_bytes(corpora / "data" / "alda")
    assert [row["step"] for row in read_rows(project / "run") if "loss" in row] == [1, 2, 3]
    assert list((project / "report").glob("*.html"))
    names = {path.name for path in (project / "logs").iterdir()}
    assert {f"tokenize-{jobs['tokenize']}_{task}.log" for task in range(3)} <= names
    assert {f"{name}-{jobs[name]}.log" for name in ("merge", "verify", "plan", "train")} <= names


@pytest.mark.slow
def test_behind_a_step_that_fails_none_runs_until_it_is_mended(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "number {n}"}}\n' for n in range(100)) + "oops\n")
    shard = f"data tokenize text.jsonl --tokenizer {corpora}/tok --out out/a --workers 1"
    steps: dict[str, Any] = {
        "good": {"command": f"data verify {corpora}/data/alda"},
        "bad": {"command": f"{shard} --shard %task/%tasks", "array": 2},
        "merge": {"command": "data merge --shards --overwrite --out out/a", "after": "bad"},
        "last": {"command": "data verify out/a", "after": ["good", "merge"]},
    }

    def states() -> list[str]:
        jobs = jobs_of(call(write(tmp_path, steps), env=cluster.environment))
        cluster.wait_for_all()
        return [cluster.state(job) for job in jobs.values()]

    assert states() == ["COMPLETED", "FAILED", "CANCELLED", "CANCELLED"]
    ran = sorted(path.name.split("-")[0] for path in (tmp_path / "logs").iterdir())
    assert ran == ["bad", "bad", "good"]
    steps["bad"]["command"] += " --on-error skip"
    assert states() == ["COMPLETED"] * 4


def test_what_sbatch_refuses_midway_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    small_run(tmp_path, tmp_path)
    steps = {
        "first": {**VERIFY, "sbatch": "--hold"},
        "train": {**TRAIN, "after": "first"},
        "last": {**VERIFY, "after": "train", "sbatch": "--partition=nowhere"},
    }
    done = call(write(tmp_path, steps), env=cluster.environment)
    assert done.returncode == 1
    assert done.stderr.startswith("megaphase: sbatch refused the job: ")
    assert len(done.stderr.splitlines()) == 1
    assert not cluster.run("squeue", "--noheader")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sweep(cluster: Cluster, corpora: Path, tmp_path: Path) -> None:
    for number in range(2):
        path = small_run(tmp_path / "runs", corpora, seed=number, output=f"out-{number}")
        path.rename(path.with_name(f"{number}.yaml"))
    steps = {
        "sweep": {**TRAIN, "train": "runs/%task.yaml", "array": 2},
        "report": {"command": "report runs/out-* --out report", "after": "sweep"},
    }
    jobs = jobs_of(call(write(tmp_path, steps), env=cluster.environment))
    cluster.wait_for(jobs["report"], "COMPLETED")
    for number in range(2):
        output = tmp_path / "runs" / f"out-{number}"
        assert read_job(output).job == f"{jobs['sweep']}_{number}"
        assert len([row for row in read_rows(output) if "loss" in row]) == 3
    assert list((tmp_path / "report").glob("*.html"))
