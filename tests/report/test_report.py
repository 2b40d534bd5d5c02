"""The report on real files: run directories as written by training, with synthetic losses."""

import csv
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from report_support import (
    END,
    LOW,
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

from megaphase.report.plots import comparison_plot, learning_rate_plot, loss_plot
from megaphase.report.report import (
    final_losses,
    load_run,
    summary_table,
    verdicts,
    write_report,
)
from megaphase.report.report_files import write_page
from megaphase.sweep.commands import report_command
from megaphase.utils.errors import InputError
from megaphase.utils.plot_style import LABEL_GAP_POINTS, WIDE, line_colours, spread


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "two-phase")


@pytest.fixture(scope="module")
def index(run_dir, tmp_path_factory):
    return write_report([run_dir], tmp_path_factory.mktemp("out") / "report")


def console_text(table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_final_losses_are_those_of_the_rows(run_dir):
    found = {(row.phase, row.task): row for row in final_losses(load_run(run_dir))}
    assert set(found) == {(name, task) for name, _, _ in PHASES for task in TASKS}
    hi = found["joint", "hi"]
    assert hi.low_resource
    assert hi.complete
    assert (hi.start, hi.end) == (held_out_loss("hi", SWITCH), held_out_loss("hi", END))
    assert hi.end_bits_per_byte == held_out_loss("hi", END) / 2
    en = found["joint", "en"]
    assert not en.low_resource
    assert (en.best, en.best_step) == (held_out_loss("en", SWITCH), SWITCH)


def test_verdicts_say_what_got_better_and_what_got_worse(run_dir):
    hi, _, en, _ = verdicts(load_run(run_dir))
    before, after = held_out_loss("hi", SWITCH), held_out_loss("hi", END)
    assert hi == (
        f"hi: {before:.2f} at the switch to joint, {after:.2f} at the end of joint: "
        f"better by {before - after:.2f} nats (bits per byte {before / 2:.2f} → {after / 2:.2f})"
    )
    change = held_out_loss("en", END) - held_out_loss("en", SWITCH)
    assert en.startswith("en: ")
    assert f"worse by {change:.2f} nats" in en


def test_verdict_on_a_loss_that_rose_again_or_diverged(tmp_path):
    run_dir = write_run(tmp_path / "run")
    row = {"step": END, "phase": "joint", "validation": {
        "hi": {"loss": 7.5, "bits_per_byte": 3.0}, "eu": {"loss": None, "bits_per_byte": None},
    }}  # fmt: skip
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")  # replaces the earlier row of that step
    hi, eu, *_ = verdicts(load_run(run_dir))
    assert "worse by" in hi
    assert hi.endswith(f"it had been at {held_out_loss('hi', 80):.2f} at step 80 and rose again")
    assert "diverged" in eu
    assert write_report([run_dir], tmp_path / "report").exists()


def test_a_run_that_goes_on_loads_and_is_reported(tmp_path):
    run_dir = write_run(tmp_path / "run", until=35)
    whole = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(whole + '{"step": 36, "pha')
    run = load_run(run_dir)
    assert run.last_step == 35
    assert run.switches == []
    loss = held_out_loss("hi", 30)
    expected = f"hi: {loss:.2f} at step 30, before the end of pretrain; the switch is still to come"
    assert verdicts(run)[0] == expected
    assert "now in pretrain" in console_text(summary_table(run))
    assert "Not finished: 35 of 90 steps" in write_report([run_dir], tmp_path / "out").read_text()


def write_phases(run_dir, phases, seq_lens=None):
    """Write a run; seq_lens: of each phase."""
    write_run(run_dir, phases)
    plan = json.loads((run_dir / "plan.json").read_text())
    for phase, seq_len in zip(plan["phases"], seq_lens or [], strict=False):
        phase["seq_len"] = seq_len
    (run_dir / "plan.json").write_text(json.dumps(plan))
    return run_dir


ENTERING = (
    ("pretrain", 40, {"en": 0.6, "fr": 0.4}),
    ("joint", 30, {"en": 0.5, "fr": 0.3, "hi": 0.2}),
    ("last", 20, {"en": 0.5, "fr": 0.2, "hi": 0.2, "eu": 0.1}),
)


def test_a_verdict_begins_at_the_switch_at_which_a_task_enters_the_mixture(tmp_path):
    found = {line[:2]: line for line in verdicts(load_run(write_phases(tmp_path / "r", ENTERING)))}
    for task in ("en", "fr", "hi"):
        assert f"{held_out_loss(task, 40):.2f} at the switch to joint, " in found[task]
    assert f"{held_out_loss('eu', 70):.2f} at the switch to last, " in found["eu"]


def test_losses_of_several_sequence_lengths_are_said_to_be(tmp_path):
    run_dir = write_phases(tmp_path / "grows", ENTERING, (64, 64, 128))
    run = load_run(run_dir)
    found = {line[:2]: line for line in verdicts(run)}
    start, end = held_out_loss("hi", 70), held_out_loss("hi", 90)
    assert found["hi"].endswith(
        "; the first is measured with seq_len 64, the second with 128: with the model of last it "
        f"was {start:.2f} at the start of last, since then better by {start - end:.2f} nats"
    )
    assert "seq_len" not in found["eu"]
    note = "different sequence lengths: 64 in pretrain, joint; 128 in last."
    assert note in " ".join(console_text(summary_table(run)).split())
    usual = write_run(tmp_path / "usual")
    page = write_report([usual, run_dir], tmp_path / "report").read_text()
    assert note in page
    assert "different sequence lengths: 64 in usual; 128 in grows." in page
    alone = write_report([usual], tmp_path / "alone").read_text()
    assert "are measured with" not in alone


def test_other_rotary_positions_are_said_to_be(tmp_path):
    run_dir = write_run(tmp_path / "run")
    settings = json.loads((run_dir / "run.json").read_text())
    settings["phases"] = [{"name": "pretrain"}, {"name": "joint", "model": {"rotary_base": 5e5}}]
    (run_dir / "run.json").write_text(json.dumps(settings))
    run = load_run(run_dir)
    assert "rotary positions" in console_text(summary_table(run))
    assert "measured with" not in verdicts(run)[0]  # since the switch, with the new ones


def test_low_resource_tasks_are_those_that_the_first_phase_leaves_out(run_dir, tmp_path):
    assert load_run(run_dir).low_resource_tasks == set(LOW)
    static = load_run(write_run(tmp_path / "static", STATIC))
    assert static.low_resource_tasks == set()
    assert " at the start, " in verdicts(static)[0]


def test_roles_name_the_tasks(tmp_path):
    run_dir = write_run(tmp_path / "added", [PHASES[1], PHASES[0]])
    roles = dict.fromkeys(TASKS, "new") | dict.fromkeys(("en", "fr"), "old")
    settings = json.loads((run_dir / "run.json").read_text())
    settings["tasks"] = {task: {"role": role} for task, role in roles.items()}
    (run_dir / "run.json").write_text(json.dumps(settings))
    run = load_run(run_dir)
    text = console_text(summary_table(run))
    page = write_report([run_dir], tmp_path / "report").read_text()
    for task, role in roles.items():
        assert f"{task} ({role})" in text
        assert f'<b>{task}</b><span class="group">{role}</span>' in page
    assert "low" not in text


def test_the_languages_of_the_model_are_not_low_resource(tmp_path):
    phases = [("rows", 30, {"hi": 0.5, "eu": 0.5}), ("joint", 60, dict.fromkeys(TASKS, 0.2))]
    run_dir = write_run(tmp_path / "added", phases)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows[0]["trained_tokens"] = [100, 140]
    write_rows(run_dir, rows)
    run = load_run(run_dir)
    assert run.low_resource_tasks == set(TASKS) - {"hi", "eu"}  # as ever without roles
    assert run.groups == ("low-resource", "high-resource")
    roles = {task: "new" if task in ("hi", "eu") else "old" for task in TASKS}
    run = replace(run, settings={"tasks": {task: {"role": role} for task, role in roles.items()}})
    assert run.low_resource_tasks == {"hi", "eu"}
    assert run.groups == ("new", "old")


def test_summary_table(run_dir):
    text = console_text(summary_table(load_run(run_dir)))
    losses = [held_out_loss("hi", step) for step in (0, SWITCH, END)]
    numbers = [f"{loss:.3f}" for loss in losses] + [f"{losses[2] - losses[1]:+.3f}"]
    numbers += [f"{losses[2] / 2:.3f}", f"{36 * SEQ_LEN / TASKS['hi']:.2f}"]
    line = next(line for line in text.splitlines() if "hi (low)" in line)
    assert re.findall(r"[-+]?\d+\.\d+", line) == numbers


def test_tables_of_the_page(index):
    losses, data = (row for row in Page(index).rows if row[0] == "hi")
    at = {step: f"{held_out_loss('hi', step):.3f}" for step in (0, SWITCH, END)}
    bits = {step: f"{held_out_loss('hi', step) / 2:.3f}" for step in (SWITCH, END)}
    assert losses == [
        "hi",
        at[0], at[SWITCH], f"{at[SWITCH]} at {SWITCH}", bits[SWITCH],
        at[SWITCH], at[END], f"{at[END]} at {END}", bits[END],
    ]  # fmt: skip
    tokens = f"{36 * SEQ_LEN:,}"  # 0.15 of 240 samples
    epochs = f"{36 * SEQ_LEN / 500:.2f}"
    assert data == [
        "hi", "500", "5", "4", "–", "–", "–", "15.00%", tokens, epochs, tokens, f"{epochs} ⚠",
    ]  # fmt: skip


def test_page_is_self_contained_and_its_files_are_there(index):
    page = Page(index)
    text = index.read_text()
    assert page.fetched == []
    assert not re.search(r"@import|@font-face|url\((?!#)|<script", text)
    assert len(set(page.ids)) == len(page.ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(page.ids)
    assert "tok/&lt;b&gt;" in text
    for name in ("loss", "learning_rate", "data"):
        assert f"plots/{name}.png" in page.links
    for link in page.links:
        assert (index.parent / link).stat().st_size > 0
    plots = list((index.parent / "plots").iterdir())
    assert {p.read_bytes()[:4] for p in plots if p.suffix == ".png"} == {b"\x89PNG"}


def test_numbers_are_those_of_the_rows(index):
    def rows(name):
        with open(index.parent / "numbers" / f"{name}.csv", newline="") as file:
            return list(csv.DictReader(file))

    validation = {(r["step"], r["phase"], r["task"]): float(r["loss"]) for r in rows("validation")}
    assert len(validation) == 11 * len(TASKS)
    assert validation["80", "joint", "eu"] == held_out_loss("eu", 80)
    training = rows("training")
    assert [int(row["step"]) for row in training] == list(range(1, END + 1))
    assert training[0]["mfu"] == ""
    by_task = {(row["step"], row["task"]): float(row["loss"]) for row in rows("training_by_task")}
    assert by_task["70", "hi"] == held_out_loss("hi", 70) - 0.1
    assert len(by_task) == 60 * 2 + 30 * 4
    assert len(rows("final_losses")) == 8
    plan = {(row["phase"], row["task"]): row for row in rows("plan")}
    assert float(plan["joint", "hi"]["rate"]) == 0.15


def test_several_runs_are_compared_on_one_page(run_dir, tmp_path):
    worse = write_run(tmp_path / "a b" / "two-phase", shift=0.2)
    static = write_run(tmp_path / "static", STATIC)
    page = Page(write_report([run_dir, worse, static, run_dir], tmp_path / "report"))
    header, *rows = page.rows[:4]
    assert header == ["run", "en", "fr", "hi", "eu", "steps"]
    ends = [held_out_loss("hi", END) + shift for shift in (0, 0.2, 0)]
    assert [row[3] for row in rows] == [f"{end:.3f}" for end in ends]
    assert len({row[0] for row in rows}) == 3
    assert len(set(page.ids)) == len(page.ids)
    assert "plots/comparison.svg" in page.links


def test_report_replaces_a_report_and_nothing_else(run_dir, tmp_path):
    out = tmp_path / "report"
    write_report([run_dir], out)
    (out / "plots" / "left-over.png").touch()
    write_report([run_dir], out)
    assert not (out / "plots" / "left-over.png").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"contains notes\.txt"):
        write_report([run_dir], out)
    with pytest.raises(InputError, match="not an earlier report"):
        write_report([run_dir], run_dir)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"]


# Writes a report, and is killed when the new one is to be given its name.
KILLED = """
import os, signal, sys
from pathlib import Path
from megaphase.report.report import write_report

def rename_or_die(source, target, rename=os.rename):
    if str(source).endswith(".partial"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.rename = rename_or_die
write_report([Path(sys.argv[1])], Path(sys.argv[2]))
"""


def test_a_report_survives_a_kill_between_two_renames(run_dir, tmp_path):
    out = tmp_path / "report"
    (tmp_path / "link").symlink_to("report")
    page = write_report([run_dir], out).read_text()
    killed = subprocess.run([sys.executable, "-c", KILLED, run_dir, tmp_path / "link"])
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.glob(".report.*.partial"))) == 1
    with pytest.raises(ZeroDivisionError):  # even a call that fails restores the earlier one
        write_page(out, "none", lambda folder: 1 // 0)
    assert (out / "index.html").read_text() == page
    write_report([run_dir], tmp_path / "link")
    assert (out / "plots").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "report"]
    assert (tmp_path / "link").is_symlink()


EARLY = (("pretrain", 40, PHASES[0][2]), ("joint", 20, PHASES[1][2]))
REASON = "hi has overfit: no gain for 2 validations (best 5.0000 at step 20)"


def write_rows(run_dir: Path, rows) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def early(tmp_path):
    """Return a run whose first phase ended after 40 of 60 steps, and which is in its second."""
    run_dir = write_run(tmp_path / "early")
    rows = list(rows_of(EARLY, 0.0, 50))
    for row in rows:
        if row.get("event") == "phase_end":
            row["reason"] = REASON
        if row.get("phase") == "joint" and "validation" in row and row["step"] > 40:
            row["validation"]["hi"]["gap"] = 0.25
            row["validation"]["eu"]["gap"] = None
    write_rows(run_dir, rows)
    return run_dir


def test_a_phase_that_ended_early_has_the_length_that_it_came_to(early, tmp_path):
    run = load_run(early)
    pretrain, joint = run.plan.phases
    assert (pretrain.steps, pretrain.ended_early) == (40, REASON)
    assert (joint.steps, joint.ended_early) == (30, None)
    assert (run.switches, run.planned_steps) == ([(40, "joint")], 70)
    en = 0.6 * 40 * SAMPLES, 0.45 * 30 * SAMPLES
    assert pretrain.tasks["en"].samples == round(en[0])
    assert run.planned_epochs("en") == pytest.approx(sum(en) * SEQ_LEN / TASKS["en"])
    ends = {(loss.phase, loss.task): loss for loss in final_losses(run)}
    assert ends["pretrain", "en"].complete
    assert ends["pretrain", "en"].end_step == 40
    assert not ends["joint", "en"].complete
    index = write_report([early], tmp_path / "report")
    text = index.read_text()
    assert "Not finished: 50 of 70 steps, joint from step 40" in text
    assert f"; pretrain ended early, after 40 steps: {REASON}" in text
    _, data = (row for row in Page(index).rows if row[0] == "en")
    assert data[5] == f"{round(en[0]) * SEQ_LEN:,}"


def test_gaps_are_shown_where_there_are_any(early, tmp_path):
    index = write_report([early], tmp_path / "report")
    losses = {row[0]: row for row in Page(index).rows if len(row) == 11}
    assert losses["hi"][5] == "–"
    assert losses["hi"][10] == "+0.250"
    assert losses["eu"][10] == "–"
    with open(index.parent / "numbers" / "validation.csv", newline="") as file:
        found = {(r["step"], r["task"]): r["gap"] for r in csv.DictReader(file)}
    assert (found["50", "hi"], found["50", "eu"], found["0", "hi"]) == ("0.25", "", "")


def test_averages_are_shown_in_the_phases_that_have_one(tmp_path):
    run_dir = write_run(tmp_path / "run")
    rows = list(rows_of(PHASES, 0.0, END))
    for row in rows:
        if row.get("phase") == "joint" and "validation" in row and row["step"] > SWITCH:
            row["validation_average"] = {
                task: {"loss": figures["loss"] - 0.125, "bits_per_byte": 0.5}
                for task, figures in row["validation"].items()
            }
    write_rows(run_dir, rows)
    index = write_report([run_dir], tmp_path / "report")
    losses = {row[0]: row for row in Page(index).rows if len(row) == 10}
    assert losses["hi"][9] == f"{held_out_loss('hi', END) - 0.125:.3f}"
    assert "Average: the loss of the average of the weights" in index.read_text()
    with open(index.parent / "numbers" / "validation_average.csv", newline="") as file:
        found = {(r["step"], r["task"]): float(r["loss"]) for r in csv.DictReader(file)}
    steps = range(SWITCH + 10, END + 1, 10)
    assert found.keys() == {(str(step), task) for step in steps for task in TASKS}
    for (step, task), loss in found.items():
        assert loss == pytest.approx(held_out_loss(task, int(step)) - 0.125)
    plot = loss_plot(load_run(run_dir), line_colours(TASKS), WIDE)
    lines = [line for axes in plot.axes for line in axes.get_lines()]
    dotted = [line for line in lines if line.get_marker() == "."]
    assert len(dotted) == len(TASKS)


BASE_STEPS = 1000


@pytest.fixture
def branched(tmp_path):
    """Return a run of the second phase alone that started from step 1000 of another one."""
    run_dir = write_run(tmp_path / "branched", PHASES[1:])
    origin = {"step": BASE_STEPS, "used": {"en": 500, "fr": 300, "hi": 0}}
    (run_dir / "origin.json").write_text(json.dumps(origin))
    rows = rows_of(PHASES[1:], 0.0, 20)
    branch = {"step": 0, "event": "branch", "checkpoint": "base/checkpoints/step-00001000"}
    write_rows(run_dir, [row | {"step": row["step"] + BASE_STEPS} for row in (branch, *rows)])
    return run_dir


def test_a_branch_counts_its_steps_on(branched, tmp_path):
    run = load_run(branched)
    assert run.low_resource_tasks == {"hi", "eu"}
    assert run.switches == [(BASE_STEPS, "joint")]
    assert not run.phase_is_over(run.plan.phases[0])
    assert (run.last_step, run.planned_steps) == (1020, 1030)
    assert "now in joint" in console_text(summary_table(run))
    before, now = held_out_loss("hi", 0), held_out_loss("hi", 20)
    assert verdicts(run)[0].startswith(
        f"hi: {before:.2f} at the switch to joint, {now:.2f} at step 1,020, before the end of joint"
    )
    text = write_report([branched], tmp_path / "report").read_text()
    assert "Not finished: 1,020 of 1,030 steps (the first 1,000 of another run)" in text
    (branched / "origin.json").write_text("{}")
    with pytest.raises(InputError, match=r"origin\.json: is damaged"):
        load_run(branched)


def test_plots_of_a_branch_begin_where_it_began(branched):
    run, size = load_run(branched), WIDE
    colours = line_colours(run.tasks)
    for figure in (
        loss_plot(run, colours, size),
        learning_rate_plot(run, size),
        comparison_plot([run, run], size),
    ):
        assert figure.axes[0].get_xlim() == pytest.approx((BASE_STEPS, BASE_STEPS + 1.01 * 20))


def test_a_finished_branch_is_finished(branched):
    rows = rows_of(PHASES[1:], 0.0, 30)
    write_rows(branched, [row | {"step": row["step"] + BASE_STEPS} for row in rows])
    run = load_run(branched)
    assert run.phase_is_over(run.plan.phases[0])
    assert run.plan.phases[0].ended_early is None
    assert (run.last_step, run.planned_steps) == (1030, 1030)


def test_skipped_steps_are_drawn_and_tabled(run_dir, tmp_path):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row.get("step") == 70 and "loss" in row:
            row |= {"loss": None, "grad_norm": None, "skipped": True}
            row["loss_by_task"] = dict.fromkeys(row["loss_by_task"])
    shutil.copytree(run_dir, tmp_path / "run")
    write_rows(tmp_path / "run", rows)
    assert write_report([tmp_path / "run"], tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", None, r"run\.json: no such file"),
        ("plan.json", "{", r"plan\.json: Invalid JSON"),
        ("plan.json", '{"tasks": {}}', r"plan\.json: phases: Field required"),
        ("metrics.jsonl", None, r"metrics\.jsonl: no such file"),
        ("metrics.jsonl", "", r"metrics\.jsonl: has no validation row yet"),
        ("metrics.jsonl", '{"step": 1\n{}\n', r"has no validation row: .* 2 lines cannot be read"),
        ("metrics.jsonl", '{"step": 1}\n', r"has no validation row: .* 1 line cannot be read"),
        (
            "metrics.jsonl",
            '{"step": 0, "phase": "other", "validation": {}}\n',
            r"metrics\.jsonl: step 0 is of phase 'other'",
        ),
    ],
)
def test_broken_run_directories_are_named(tmp_path, file, text, message):
    run_dir = write_run(tmp_path / "run")
    (run_dir / file).unlink()
    if text is not None:
        (run_dir / file).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        write_report([run_dir], tmp_path / "report")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_command_prints_table_verdicts_and_path(run_dir, tmp_path):
    app = typer.Typer()
    app.command()(report_command)
    result = CliRunner().invoke(app, [str(run_dir), "--out", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    assert "hi (low)" in result.output
    (title,) = [line for line in result.output.splitlines() if "after joint" in line]
    for column in ("task", "at start", "after pretrain", "since switch", "bits/byte", "epochs"):
        assert column in title
    assert "…" not in result.output
    assert verdicts(load_run(run_dir))[0] in result.output
    assert f"Report: {tmp_path / 'report' / 'index.html'}" in result.output


def test_labels_are_spread_without_overlap():
    placed = spread([0.0, 1.0, 2.0, 99.0, 100.0], 100.0)
    assert all(b - a >= LABEL_GAP_POINTS - 1e-9 for a, b in itertools.pairwise(placed))
    assert placed[0] >= 0
    assert placed[-1] <= 100
    assert spread([20.0, 60.0], 100.0) == [20.0, 60.0]
