"""Reports of runs that diverged, skipped steps or had loss spikes."""

import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from report_support import END, SWITCH, Page, held_out_loss, write_run

from megaphase.report.incidents import incident_sentences
from megaphase.report.losses import task_verdicts
from megaphase.report.plots import loss_plot
from megaphase.report.report import load_run, write_report
from megaphase.utils.plot_style import NARROW, WIDE

SPIKES = [3, 4, 5, 6, 7, 8]


def add_rows(run_dir, *rows):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def raise_losses(run_dir, steps, loss):
    """Change the training losses of these steps."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if "loss" in row and row["step"] in steps:
            row |= {"loss": loss, "loss_by_task": dict.fromkeys(row["loss_by_task"], loss)}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def divergence(step, kind="above_uniform", **facts):
    facts = {"since": step - 3, "loss": 253.0, "loss_before": 5.04} | facts
    return {"step": step, "event": "divergence", "phase": "joint", "kind": kind, **facts}


EXCEEDED = {
    "loss": {"value": 9.0, "mean": 4.0, "standard_deviation": 0.5},
    "grad_norm": {"value": 1.5, "mean": 1.0, "standard_deviation": 0.0},
}


def test_every_event_has_a_sentence(tmp_path):
    run_dir = write_run(tmp_path / "run")
    add_rows(
        run_dir,
        *({"step": step, "event": "loss_spike", "phase": "pretrain"} for step in SPIKES),
        {"step": 9, "event": "step_skipped", "phase": "pretrain"},
        {"step": 11, "event": "spike_skipped", "phase": "pretrain"},
        {"step": 12, "event": "spike_skipped", "phase": "pretrain", "exceeded": EXCEEDED},
        divergence(64),
        {"step": 70, "event": "divergence_over", "phase": "joint", "kind": "above_uniform"},
        divergence(80, "stuck", loss=8.29, loss_before=8.29),
        divergence(84, "gradient_norm", loss=None, loss_before=None),
        {"step": END, "event": "divergence_stop", "phase": "joint", "kind": "stuck"},
    )
    sentences = incident_sentences(load_run(run_dir))
    assert sentences == [
        "joint step 64: training diverges: the loss rose from 5.04 at step 61 to 253, above that "
        "of uniform guessing",
        "joint step 70: the divergence is over",
        "joint step 80: the loss has not moved since step 77: it is 8.29",
        "joint step 84: gradients are far larger than before, since step 81",
        f"joint step {END}: the run ended, since it had diverged",
        "1 step was skipped as not finite: 9",
        "2 steps were left out as loss spikes: 11, 12",
        "step 12 was left out: loss 9 is 10.0 deviations above its mean 4 and gradient norm 1.5 is "
        "above its mean 1, from which no step before deviated",
        "6 loss spikes: at step 3, 4, 5, 6, 7, …",
    ]
    text = write_report([run_dir], tmp_path / "report").read_text()
    for sentence in sentences:
        assert f'<li class="worse">{sentence}</li>' in text
    assert f"Diverged: ended after {END} of {END} steps" in text


def test_a_run_without_incidents_has_no_list_of_them(tmp_path):
    run_dir = write_run(tmp_path / "run")
    assert incident_sentences(load_run(run_dir)) == []
    page = Page(write_report([run_dir], tmp_path / "report"))
    assert page.rows
    assert "loss spike" not in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_incidents_are_drawn(size, tmp_path):
    run_dir = write_run(tmp_path / "run")
    colours = dict.fromkeys(load_run(run_dir).tasks, "#000000")
    plain = loss_plot(load_run(run_dir), colours, size)
    add_rows(
        run_dir,
        {"step": 9, "event": "step_skipped", "phase": "pretrain"},
        *({"step": step, "event": "loss_spike", "phase": "pretrain"} for step in SPIKES),
        {"step": 11, "event": "spike_skipped", "phase": "pretrain"},
        divergence(64),
    )
    marked = loss_plot(load_run(run_dir), colours, size)

    def of(figure):
        axes = figure.axes[0]
        marks = [line.get_xdata() for line in axes.lines if line.get_linestyle() == "None"]
        keys = [text.get_text() for text in figure.legends[0].get_texts()]
        return [list(steps) for steps in marks], keys, [text.get_text() for text in axes.texts]

    marks, keys, labels = of(marked)
    assert sorted(marks) == [SPIKES, [9, 11]]
    assert set(keys) - set(of(plain)[1]) == {"loss spike", "skipped step"}
    assert any("diverges" in label for label in labels)
    assert not any("diverges" in label for label in of(plain)[2])
    # Nothing is cut off at the top of the figure.
    canvas = FigureCanvasAgg(marked).get_renderer()
    top = max(text.get_window_extent(canvas).y1 for text in marked.axes[0].texts)
    assert top < marked.legends[0].get_window_extent(canvas).y0 + 1


def test_training_losses_set_the_scale_where_nothing_else_was_measured(tmp_path):
    run_dir = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    few = [row for row in rows if "validation" not in row or row["step"] == 0]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    run = load_run(run_dir)
    low, high = loss_plot(run, dict.fromkeys(run.tasks, "#000000"), WIDE).axes[0].get_ylim()
    late = [
        loss
        for rows, losses in run.training.loss_by_task.values()
        for loss in losses[run.training.step[rows] > 20].tolist()
    ]
    assert low < min(late)
    assert max(late) < high


def flat_run(folder):
    """Make every loss at the end of the second phase equal to that at the switch."""
    run_dir = write_run(folder / "run")
    start = {"loss": 8.3, "bits_per_byte": 4.0}
    for step in (SWITCH, END):
        losses = dict.fromkeys(load_run(run_dir).tasks, start)
        add_rows(run_dir, {"step": step, "phase": "joint", "validation": losses})
    return run_dir


def test_a_loss_that_rose_is_never_unchanged(tmp_path):
    run_dir = flat_run(tmp_path)
    assert all("unchanged" in each.sentence for each in task_verdicts(load_run(run_dir)))
    raise_losses(run_dir, range(65, 74), 949_489.0)  # fewer steps than suffice without an event
    assert all("unchanged" in each.sentence for each in task_verdicts(load_run(run_dir)))
    raise_losses(run_dir, range(65, 75), 949_489.0)
    for verdict in task_verdicts(load_run(run_dir)):
        assert "8.30 at the end of joint: no better" in verdict.sentence
        assert verdict.sentence.endswith("its training loss rose to 949,489.00 at step 74")
        assert verdict.outcome == "worse"


def test_a_run_that_was_ended_before_it_measured_again_is_no_better(tmp_path):
    run_dir = flat_run(tmp_path)
    raise_losses(run_dir, range(82, 85), 253.0)
    add_rows(run_dir, divergence(84))
    for verdict in task_verdicts(load_run(run_dir)):
        assert "no better" in verdict.sentence
        assert "rose to 253.00 at step 84" in verdict.sentence
        assert verdict.outcome == "worse"


def test_a_loss_that_fell_is_better_although_it_rose_in_between(tmp_path):
    run_dir = write_run(tmp_path / "run")
    raise_losses(run_dir, range(62, 80), 20.0)
    hi = task_verdicts(load_run(run_dir))[0]
    change = held_out_loss("hi", SWITCH) - held_out_loss("hi", END)
    assert hi.outcome == "better"
    assert f"better by {change:.2f} nats" in hi.sentence
    assert hi.sentence.endswith("its training loss rose to 20.00 at step 79")
