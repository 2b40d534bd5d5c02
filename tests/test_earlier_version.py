"""Run directories and checkpoints of version 0.1.0; see fixtures/version_0_1_0/generate.py.

A resumed run must print the same values as that version's own run, within the tolerances of fp32
sums in another order.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from distributed import check, launch
from rounding import FP32
from run_support import megaphase, read_rows
from warm_commands import run_well

FIXTURE = Path(__file__).parent / "fixtures" / "version_0_1_0"
PROCESSES = {"rotary": 4, "learned": 1}
PRETRAIN_STEPS = 6
RESUMED_FROM = 8


@pytest.fixture
def runs(tmp_path):
    """Return a copy of the fixture, since commands write into run directories."""
    return shutil.copytree(FIXTURE, tmp_path / "runs", symlinks=True)


@pytest.fixture(params=PROCESSES)
def name(request):
    return request.param


def expected_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "expected.jsonl").read_text().splitlines()]


def training_rows(rows: list[dict]) -> dict[int, dict]:
    return {row["step"]: row for row in rows if "learning_rate" in row}


def validations(rows: list[dict]) -> dict[tuple[str, int], dict[str, float]]:
    return {
        (row["phase"], row["step"]): {task: v["loss"] for task, v in row["validation"].items()}
        for row in rows
        if "validation" in row
    }


def test_a_run_resumes_and_ends_as_it_would_have(runs, name):
    results = launch(megaphase("train", runs / name / "run.yaml"), PROCESSES[name])
    check(results)
    assert f"step-{RESUMED_FROM:08}" in results[0].stdout
    rows, expected = read_rows(runs / name / "run"), expected_rows(runs / name)

    steps, expected_steps = training_rows(rows), training_rows(expected)
    assert steps.keys() == expected_steps.keys()
    for step, row in expected_steps.items():
        assert steps[step]["loss"] == pytest.approx(row["loss"], rel=FP32)
        assert steps[step]["learning_rate"] == pytest.approx(row["learning_rate"], rel=FP32)

    measured = validations(rows)
    assert measured.keys() == validations(expected).keys()
    for key, losses in validations(expected).items():
        assert measured[key] == pytest.approx(losses, rel=FP32)


@pytest.mark.parametrize(
    ("name", "checkpoint", "step"),
    [("rotary", "pretrain", PRETRAIN_STEPS), ("rotary", "best-cimri", 8), ("learned", "latest", 8)],
)
def test_a_checkpoint_is_evaluated(runs, name, checkpoint, step):
    arguments = [runs / name / "run.yaml", "parallel.tensor=1", "--checkpoint", checkpoint]
    report = json.loads(run_well("evaluate", *arguments, "--json"))
    assert report["step"] == step
    losses = {task: figures["loss"] for task, figures in report["validation"].items()}
    phase = "pretrain" if step == PRETRAIN_STEPS else "joint"
    expected = validations(expected_rows(runs / name))[phase, step]
    assert losses == pytest.approx(expected, rel=FP32)


def test_a_branch_begins_at_the_end_of_the_first_phase(runs):
    settings = yaml.safe_load((runs / "rotary" / "run.yaml").read_text())
    branch = {**settings, "phases": settings["phases"][1:], "output": "branch"}
    branch["parallel"] = {"tensor": 1, "zero": 0}
    run_file = runs / "rotary" / "branch.yaml"
    run_file.write_text(yaml.safe_dump(branch))
    run_well("train", run_file, "--from", f"{runs / 'rotary' / 'run'}@pretrain")
    steps = training_rows(read_rows(runs / "rotary" / "branch"))
    expected = training_rows(expected_rows(runs / "rotary"))
    assert sorted(steps) == [step for step in sorted(expected) if step > PRETRAIN_STEPS]
    for step, row in steps.items():
        assert row["loss"] == pytest.approx(expected[step]["loss"], rel=FP32)


def test_a_checkpoint_is_converted(runs, name):
    checkpoint = f"{runs / name / 'run'}@latest"
    run_well("convert", "reshape", checkpoint, "--portable", "--out", runs / "portable")
    assert "step" in run_well("convert", "inspect", runs / "portable")
    tokenizer = runs / "corpora" / "tok"
    run_well("convert", "to-hf", checkpoint, "--tokenizer", tokenizer, "--out", runs / "hf")
    assert (runs / "hf" / "config.json").is_file()


def test_status_report_and_trace_read_the_run_directory(runs, name):
    run = runs / name / "run"
    assert "joint" in run_well("launch", "status", run)
    run_well("report", run, "--out", runs / "report")
    assert (runs / "report" / "index.html").is_file()
    assert "alda" in run_well("plan", "trace", runs / name / "run.yaml", "--step", RESUMED_FROM)
