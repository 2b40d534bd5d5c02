"""What differs between runs, runs that are passed over, and batches that change."""

import json

import pytest
from report_support import PHASES, SAMPLES, SEQ_LEN, STATIC, SWITCH, Page, rows_of, write_run
from rich.console import Console
from typer.testing import CliRunner

from megaphase.cli import app
from megaphase.report.batch_plot import batch_changes, batch_plot
from megaphase.report.differences import FIRST_WEIGHTS, differences
from megaphase.report.load_run import load_run
from megaphase.report.report import summary_table, write_report
from megaphase.utils.plot_style import WIDE


def schedule(peak: float, **more) -> dict:
    return {"schedule": "cosine", "peak": peak, "final": peak / 10, "warmup_steps": 8, **more}


def set_run(run_dir, **changes):
    path = run_dir / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return run_dir


@pytest.fixture
def runs(tmp_path):
    """Return two phases, one phase, and a branch with another peak."""
    joint = {"name": "joint", "learning_rate": schedule(2e-3), "optimizer_state": "reset"}
    pretrain = {"name": "pretrain", "learning_rate": schedule(3e-3), "optimizer_state": "reset"}
    two = set_run(write_run(tmp_path / "two"), phases=[pretrain, joint])
    static = {"name": "static", "learning_rate": schedule(3e-3), "optimizer_state": "reset"}
    one = set_run(write_run(tmp_path / "one", STATIC), phases=[static], seed=7)
    branch = write_run(tmp_path / "branch", PHASES[1:])
    joint = joint | {"learning_rate": schedule(1e-3, decay_steps=9), "optimizer_state": "keep"}
    set_run(branch, phases=[joint], output="elsewhere")
    origin = {"step": SWITCH, "used": {"en": 500}, "source": "runs/first@pretrain"}
    (branch / "origin.json").write_text(json.dumps(origin))
    rows = [row | {"step": row["step"] + SWITCH} for row in rows_of(PHASES[1:], 0.0, 30)]
    (branch / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [two, one, branch]


def test_differences_are_phase_by_phase(runs):
    found = {each.setting: list(each.values) for each in differences([load_run(r) for r in runs])}
    assert found["starts from"] == [FIRST_WEIGHTS, FIRST_WEIGHTS, "runs/first@pretrain"]
    assert found["phase 1"] == ["pretrain: 60 steps", "static: 90 steps", "joint: 30 steps"]
    assert [text.replace("\u00a0", " ") for text in found["phase 1, rates"]] == [
        "en 60.0%, fr 40.0%",
        "en 50.0%, fr 30.0%, hi 10.0%, eu 10.0%",
        "en 45.0%, fr 30.0%, hi 15.0%, eu 10.0%",
    ]
    assert found["phase 1, learning rate"] == [
        "cosine, peak 0.003, final 0.0003, warmup_steps 8",
        "cosine, peak 0.003, final 0.0003, warmup_steps 8",
        "cosine, peak 0.001, final 0.0001, warmup_steps 8",
    ]
    assert found["phase 1, optimizer_state"] == ["reset", "reset", "keep"]
    assert found["phase 1, learning_rate.decay_steps"] == ["–", "–", "9"]
    assert found["phase 2"] == ["joint: 30 steps", "–", "–"]
    assert found["seed"] == ["1234", "7", "1234"]
    assert not {"output", "tokenizer", "model.preset", "phase 1, name"} & found.keys()
    assert differences([load_run(runs[0])] * 2) == []


def test_the_page_shows_differences_and_names_a_branch_by_its_source(runs, tmp_path):
    page = Page(write_report(runs, tmp_path / "report"))
    assert ["phase 2", "joint: 30 steps", "–", "–"] in page.rows
    assert any(row[0] == "branch from runs/first@pretrain" for row in page.rows)
    text = (tmp_path / "report/index.html").read_text()
    assert "Finished after 90 steps (the first 60 of runs/first@pretrain)" in text
    same = write_report([runs[0], write_run(tmp_path / "same" / "a")], tmp_path / "report")
    assert "What differs between them" in same.read_text()


def report(*arguments) -> str:
    done = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_directories_without_a_run_are_passed_over(runs, tmp_path):
    planned, empty, notes = (tmp_path / name for name in ("planned", "empty", "notes.txt"))
    empty.mkdir()
    notes.write_text("")
    write_run(planned)
    (planned / "metrics.jsonl").unlink()
    told = report(runs[0], empty, runs[1], planned, notes, "--out", tmp_path / "report")
    assert f"Passed over, without a run: {empty}, {planned}, {notes}" in told.splitlines()
    assert "What differs between the 2 runs" in told
    assert "Passed over" not in report(*runs, "--out", tmp_path / "report")


@pytest.mark.parametrize("names", [["empty"], ["empty", "planned"], ["two", "missing"]])
def test_an_error_names_what_is_missing_where_there_is_no_run(runs, tmp_path, names):
    (tmp_path / "empty").mkdir()
    (write_run(tmp_path / "planned") / "metrics.jsonl").unlink()
    paths = [str(tmp_path / name) for name in names]
    done = CliRunner().invoke(app, ["report", *paths, "--out", str(tmp_path / "report")])
    assert done.exit_code != 0
    assert names[-1] if names[0] == "two" else names[0] in str(done.exception)


def test_batch_and_sequence_length_are_drawn_where_they_change(tmp_path):
    constant = load_run(write_run(tmp_path / "constant"))
    assert not batch_changes(constant)
    assert (
        "Batch and sequence length"
        not in write_report([constant.directory], tmp_path / "report").read_text()
    )
    ramp = write_run(tmp_path / "ramp")
    plan = json.loads((ramp / "plan.json").read_text())
    for phase, length in zip(plan["phases"], (SEQ_LEN, 4 * SEQ_LEN), strict=True):
        phase["seq_len"] = length
    (ramp / "plan.json").write_text(json.dumps(plan))
    samples = {step: SAMPLES // 2 if step <= 20 else SAMPLES for step in range(1, 61)}
    samples |= dict.fromkeys(range(61, 91), SAMPLES // 4)  # tokens stay, samples are longer
    rows, tokens = list(rows_of(PHASES, 0.0, 90)), 0
    for row in rows:
        if "tokens" in row:
            length = SEQ_LEN if row["step"] <= SWITCH else 4 * SEQ_LEN
            tokens += samples[row["step"]] * length
            row["tokens"] = tokens
    (ramp / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(ramp)
    assert batch_changes(run)
    batch, length = batch_plot(run, WIDE).axes
    drawn = [line for line in batch.get_lines() if len(line.get_xdata()) > 2]
    assert {
        int(step): int(value)
        for line in drawn
        for step, value in zip(line.get_xdata(), line.get_ydata(), strict=True)
    } == samples
    lines = [line for line in length.get_lines() if len(line.get_xdata()) > 2]
    assert [set(line.get_ydata()) for line in lines] == [{SEQ_LEN}, {4 * SEQ_LEN}]
    assert "Batch and sequence length" in write_report([ramp], tmp_path / "report").read_text()


def test_no_header_of_the_summary_is_cut_at_80_columns(tmp_path):
    phases = [
        (name, 20, {"en": 0.6, "fr": 0.4})
        for name in ("pretraining", "intermediate", "joint", "long-context")
    ]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(summary_table(load_run(write_run(tmp_path / "run", phases, until=80))))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in capture.get()
    words = [line.split() for line in lines]
    for column, parts in {1: ("start",), 3: ("interme", "diate"), 5: ("long-co", "ntext")}.items():
        assert all(any(part in line for line in words) for part in parts), column
