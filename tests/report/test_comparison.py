"""What differs between runs, runs that are passed over, and batches that change."""

import json

import pytest
from report_support import (
    END,
    PHASES,
    SAMPLES,
    SEQ_LEN,
    STATIC,
    SWITCH,
    TASKS,
    Page,
    held_out_loss,
    rows_of,
    write_run,
)
from rich.console import Console
from typer.testing import CliRunner

from megaphase.cli import app
from megaphase.report.batch_plot import batch_changes, batch_plot
from megaphase.report.differences import FIRST_WEIGHTS, differences, tokenizers_differ
from megaphase.report.load_run import load_run
from megaphase.report.plots import comparison_plot, loss_is_cut_off, loss_plot
from megaphase.report.report import summary_table, write_report
from megaphase.utils.plot_style import WIDE, line_colours


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
    assert text.index("Losses over the steps") < text.index("What differs between them")
    assert "<details open>" in text
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


def curve_limits(figure) -> tuple[float, float]:
    return figure.axes[0].get_ylim()


def with_validations(run_dir, losses: dict[int, float], origin: dict | None = None):
    """Rewrite a run's metrics: one task, whose held-out losses are these by step."""
    last = max(losses)
    rows = [row for row in rows_of(PHASES, 0.0, last) if "validation" not in row]
    rows += [
        {
            "step": step,
            "phase": "pretrain" if step < SWITCH else "joint",
            "validation": {"hi": {"loss": loss, "bits_per_byte": loss / 2}},
        }
        for step, loss in losses.items()
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if origin is not None:
        (run_dir / "origin.json").write_text(json.dumps(origin))
    return load_run(run_dir)


def test_only_the_steep_beginning_of_a_new_model_is_cut_off(tmp_path):
    steep = {0: 9.0, 4: 7.0, 20: 5.0, 40: 4.8, 60: 4.7, 90: 4.6}
    cut = with_validations(write_run(tmp_path / "cut"), steep)
    few = with_validations(write_run(tmp_path / "few"), {0: 9.0, 30: 5.0, 60: 4.7, 90: 4.6})
    # Started from the weights of another run: its first loss is a result.
    origin = {"step": 0, "used": {}, "source": "base/"}
    continued = with_validations(write_run(tmp_path / "continued"), steep, origin)
    for run, top, is_cut in ((cut, 5.0, True), (few, 9.0, False), (continued, 9.0, False)):
        _, high = curve_limits(loss_plot(run, line_colours(run.tasks), WIDE))
        assert top < high < top * 1.1
        assert loss_is_cut_off(run) is is_cut
    text = write_report([few.directory], tmp_path / "report").read_text()
    for absent in ("the steep beginning", "dotted: the average", "solid: where training diverges"):
        assert absent not in text
    _, high = curve_limits(comparison_plot([cut, continued], WIDE))
    assert high > 9
    _, high = curve_limits(comparison_plot([cut, cut], WIDE))
    assert high < 5.5


def test_the_loss_at_an_early_switch_is_shown(tmp_path):
    phases = [("rows", 5, {"hi": 1.0}), ("joint", 85, dict.fromkeys(TASKS, 0.25))]
    run_dir = write_run(tmp_path / "early", phases)
    run = load_run(run_dir)
    _, high = curve_limits(loss_plot(run, line_colours(run.tasks), WIDE))
    assert held_out_loss("eu", 5) < high < held_out_loss("eu", 0)


def test_runs_with_different_tokenizers_are_compared_in_bits_per_byte(runs, tmp_path):
    two, one, _ = runs
    set_run(one, tokenizer="copy/of/tok")  # as many tokens: the same one
    assert not tokenizers_differ([load_run(two), load_run(one)])
    plan = json.loads((one / "plan.json").read_text())
    plan["tasks"]["hi"]["tokens"] -= 10
    (one / "plan.json").write_text(json.dumps(plan))
    assert tokenizers_differ([load_run(two), load_run(one)])
    set_run(one, model={f"key_{i}": i for i in range(20)})
    index = write_report([two, one], tmp_path / "report")
    assert "Bits per byte of text, because the runs have different tokenizers" in index.read_text()
    assert Page(index).rows[1][3] == f"{held_out_loss('hi', END) / 2:.3f}"
    figure = comparison_plot([load_run(two), load_run(one)], WIDE)
    assert {axes.get_ylabel() for axes in figure.axes} == {"bits per byte"}
    assert "<details open>" not in index.read_text()  # what differs is long


def test_tokens_and_epochs_of_a_branch_are_labelled(runs, tmp_path):
    branch = runs[2]
    origin = json.loads((branch / "origin.json").read_text()) | {"tokens": 30_720}
    (branch / "origin.json").write_text(json.dumps(origin))
    index = write_report([branch], tmp_path / "report")
    assert " tokens (30,720 of them before), " in index.read_text()
    groups, _, *rows = Page(index).rows[-6:]
    assert groups == ["task", "corpus", "joint", "this branch", "with the run before"]
    hi = next(row for row in rows if row[0] == "hi")
    tokens, epochs = f"{36 * SEQ_LEN:,}", f"{36 * SEQ_LEN / 500:.2f}"
    assert hi[-3:] == [tokens, epochs, f"{epochs} ⚠"]


def test_conversations_are_not_low_resource(tmp_path):
    run_dir = write_run(tmp_path / "chats")
    set_run(run_dir, tasks={"hi": {"kind": "chat"}})
    assert load_run(run_dir).low_resource_tasks == {"eu"}
    set_run(run_dir, tasks={"en": {"role": "high"}, "eu": {"role": "low"}, "hi": {"kind": "chat"}})
    run = load_run(run_dir)
    assert [run.group_of(task) for task in ("en", "eu", "hi", "fr")] == ["high", "low", None, None]
    assert run.groups == ("low", "high, no role")
    console = Console(width=120)
    with console.capture() as capture:
        console.print(summary_table(run))
    assert "hi (" not in capture.get()
