"""The figures of a sweep show the numbers of its tables, and say what they leave out."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sweep_support import HIGH, LOW, STEPS, TOKENS, write_sweep

from megaphase.report.plot_parts import BEGINNING, cropped_note
from megaphase.sweep.pareto.curve_figures import curve_figures, fewer, overfitting_figure
from megaphase.sweep.pareto.curve_plots import token_line
from megaphase.sweep.pareto.figures import (
    front_plot,
    labels_of,
    loss_panels,
    models_plot,
    outside_sentence,
    pretraining_plot,
    training_front_plot,
)
from megaphase.sweep.pareto.numbers import write_sweep_numbers
from megaphase.sweep.pareto.trade_off import outside_marks
from megaphase.sweep.pareto.view import SweepView
from megaphase.utils.plot_style import NARROW, WIDE, inch_axes, new_figure

SEEDS = [1, 2, 3]
ARMS = {
    "static": {"rates": [0.1, 0.5], "temperatures": [3.3]},
    "two-phase": {"rates": [0.1, 0.5], "pretrain": [0.5, 0.8]},
    "low-only": {"pretrain": [0.8]},
    "cascade": {
        "phases": [
            {"share": 0.4, "rate": 0},
            {"share": 0.3, "rate": 0.1},
            {"rate": 0.4, "learning_rate": {"peak": 0.004}},
        ]
    },
    "longer": {
        "budget": "own",
        "phases": [{"steps": [30, 45], "rate": 0}, {"steps": 20, "rate": 0.3}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_sweep(tmp_path_factory.mktemp("sweeps") / "sweep", ARMS, seeds=SEEDS)
    for file in (folder / "outcomes").iterdir():
        outcome = json.loads(file.read_text())
        outcome["training"] = {
            task: 0.9 * loss - 0.1 * i for i, (task, loss) in enumerate(outcome["losses"].items())
        }
        file.write_text(json.dumps(outcome))
    return folder


@pytest.fixture(scope="module")
def view(folder):
    return SweepView.of(folder)


@pytest.fixture(scope="module")
def tables(view, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "numbers"
    write_sweep_numbers(view, folder)
    return folder


def rows(tables: Path, name: str, **where: str) -> list[dict[str, str]]:
    with open(tables / f"{name}.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return [row for row in found if where.items() <= row.items()]


def bars(axes):
    """Return (x, y, half width of x, half width of y) of every point with error bars."""
    found = []
    for container in axes.containers:
        line, _, collections = container
        halves = {}
        for collection in collections:
            segments = np.array(collection.get_segments())
            lengths = np.abs(np.diff(segments, axis=1))[:, 0]
            direction = int(np.argmax(lengths.max(axis=0)))
            halves[direction] = lengths[:, direction] / 2
        for i, (x, y) in enumerate(line.get_xydata()):
            found.append((x, y, *(halves[d][i] if d in halves else 0.0 for d in (0, 1))))
    return sorted(found)


def numbers_of(table, *columns):
    return sorted(tuple(float(row[column]) for column in columns) for row in table)


@pytest.mark.parametrize("name", ["front", "training_front"])
def test_fronts_show_the_numbers_of_the_table(name, view, tables):
    plot = front_plot(view) if name == "front" else training_front_plot(view)
    (axes,) = plot.draw(WIDE).axes
    table = rows(tables, "trade_offs", figure=name, on_front="True", outside="False")
    drawn = numbers_of(table, "high", "low", "high_interval", "low_interval")
    assert np.array(bars(axes)) == pytest.approx(np.array(drawn))
    faint = [line for line in axes.get_lines() if line.get_alpha() == 0.3]
    others = rows(tables, "trade_offs", figure=name, on_front="False")
    points = sorted(map(tuple, np.concatenate([line.get_xydata() for line in faint])))
    assert np.array(points) == pytest.approx(np.array(numbers_of(others, "high", "low")))


def test_training_losses_are_those_of_the_outcomes(folder, tables):
    (row,) = rows(tables, "trade_offs", figure="training_front", arm="static", rate="0.5",
                  peak="0.004")  # fmt: skip
    files = [folder / "outcomes" / f"static-r0.5-p0.004-s{seed}.json" for seed in SEEDS]
    training = [json.loads(file.read_text())["training"] for file in files]
    for group, tasks in (("high", HIGH), ("low", LOW)):
        values = [each[task] for each in training for task in tasks]
        assert float(row[group]) == pytest.approx(sum(values) / len(values))


def test_without_training_losses_there_is_no_such_figure(tmp_path):
    assert training_front_plot(SweepView.of(write_sweep(tmp_path / "sweep", ARMS, until=9))) is None


@pytest.mark.parametrize(
    ("fixed", "title"), [("total", "share of the budget"), ("last phase", "steps of the")]
)
def test_pretraining_shows_the_numbers_of_the_table(fixed, title, view, tables):
    figure = pretraining_plot(view, view.fronts[0], fixed).draw(WIDE)
    table = rows(tables, "choices", figure=f"pre-training, {fixed} fixed")
    for axes, group in zip(figure.axes, ("high", "low"), strict=True):
        assert title in axes.get_xlabel()
        expected = [
            (x, y, 0, half) for x, y, half in numbers_of(table, "place", group, f"{group}_interval")
        ]
        assert np.array(bars(axes)) == pytest.approx(np.array(expected))
    for line in {row["line"] for row in table} - {""}:
        members = [row for row in table if row["line"] == line]
        kept = "last_steps" if fixed == "last phase" else "steps"
        for column in ("arm", "rate", "peaks", kept):
            assert len({row[column] for row in members}) == 1
        assert len({row["first_steps"] for row in members}) == len(members) > 1
    arms = {row["arm"] for row in table}
    assert arms == ({"two-phase"} if fixed == "total" else {"longer"})


def test_curves_over_tokens_show_the_numbers_of_the_table(view, tables):
    plots = {plot.name: plot for plot in curve_figures(view, view.fronts[0])}
    for name, loss in (("data_efficiency", "validation"), ("training_efficiency", "training")):
        (axes,) = plots[name].draw(WIDE).axes
        drawn = np.concatenate([line.get_xydata() for line in axes.get_lines()])
        expected = [
            (float(row["low_tokens"]), float(row[f"{loss}_loss"]))
            for row in rows(tables, "over_tokens")
        ]
        assert drawn == pytest.approx(np.array(expected), nan_ok=True)
    (axes,) = plots["convergence"].draw(WIDE).axes
    drawn = np.concatenate([line.get_xydata() for line in axes.get_lines()])
    table = rows(tables, "convergence")
    expected = [(float(row["high_epochs"]), float(row["validation_loss"])) for row in table]
    assert drawn == pytest.approx(np.array(expected))


def test_convergence_by_hand(view, tables):
    row = rows(tables, "convergence", arm="two-phase", pretrain_share="0.8")[-1]
    high = sum(TOKENS[task] for task in HIGH)
    assert float(row["epochs_before_last_phase"]) == pytest.approx(48 * 8 * 64 / high, rel=1e-3)
    plot = next(p for p in curve_figures(view, view.fronts[0]) if p.name == "convergence")
    longest = max(
        rows(tables, "convergence"), key=lambda row: float(row["epochs_before_last_phase"])
    )
    epochs = float(longest["epochs_before_last_phase"])
    fall = float(longest["fall_at_the_end"])
    assert fall > 0
    assert f"({longest['arm']}) ends after {epochs:.2f} epochs" in plot.caption
    assert f"fell by {fall:.3f} nats" in plot.caption


def test_padding_is_no_repetition(view):
    fronts = view.fronts[0]
    padded = {
        name: replace(
            curves,
            epochs={
                task: [0.8 * each for each in values] for task, values in curves.epochs.items()
            },
        )
        for name, curves in view.curves.items()
    }
    point = fronts.points[0]
    line, other = (token_line(point, each, LOW, TOKENS) for each in (view.curves, padded))
    assert other.tokens == pytest.approx(line.tokens)
    assert other.epochs == pytest.approx(0.8 * line.epochs)
    assert line.epochs == pytest.approx(line.tokens / sum(TOKENS[task] for task in LOW), rel=0.01)


def test_losses_before_a_task_is_trained_do_not_hide_those_after(view):
    plot = next(p for p in curve_figures(view, view.fronts[0]) if p.name == "losses")
    for task, axes in zip((*HIGH, *LOW), plot.draw(WIDE).axes, strict=True):
        low, high = axes.get_ylim()
        curves = [line for line in axes.get_lines() if line.get_marker() == "o"]
        assert all(low < line.get_ydata()[-1] < high for line in curves)
        # All arms but static have the low-resource tasks after their first switch alone.
        first = min(line.get_xdata()[i] for line in curves for i in line.get_markevery())
        shown = [
            loss
            for line in curves
            for switch in [[line.get_xdata()[i] for i in line.get_markevery()]]
            for step, loss in line.get_xydata()
            if step >= min(first, BEGINNING * STEPS)
            and (task in HIGH or not switch or step > switch[0])
        ]
        room = 0.08 * (max(shown) - min(shown))
        assert (low, high) == pytest.approx((min(shown) - room, max(shown) + room))


def test_every_switch_of_a_recipe_is_marked(view):
    plot = next(p for p in curve_figures(view, view.fronts[0]) if p.name == "losses")
    figure = plot.draw(WIDE)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    at = next(i for i, name in enumerate(names) if name.startswith("cascade "))
    assert names[at].endswith(", 4e-3")
    for axes in figure.axes:
        curves = [line for line in axes.get_lines() if line.get_marker() == "o"]
        steps = curves[at].get_xdata()
        assert [int(steps[i]) for i in curves[at].get_markevery()] == [24, 42]


def test_a_chain_of_three_runs_has_one_curve(view):
    (name,) = {
        trial.name
        for trial in view.record.trials
        if (trial.arm, trial.seed, trial.is_final, trial.peak) == ("cascade", 1, True, 0.004)
        and trial.setting.peaks == (0.004,) * 3
    }
    run = view.curves[name]
    assert list(run.steps) == sorted(set(run.steps))
    assert (run.steps[0], run.steps[-1], list(run.switches)) == (0, STEPS, [24, 42])
    samples = 8 * 64
    low = {step: sum(run.tokens[task][run.at(step)] for task in LOW) for step in (24, 42, STEPS)}
    expected = {24: 0, 42: 18 * 0.1 * samples, STEPS: (18 * 0.1 + 18 * 0.4) * samples}
    assert low == pytest.approx(expected, abs=8)
    for task in TOKENS:
        assert list(run.tokens[task]) == sorted(run.tokens[task])
        assert run.epochs[task] == pytest.approx(
            np.array(run.tokens[task]) / TOKENS[task], abs=0.02
        )


def test_every_point_and_line_names_its_peaks(view):
    labels = labels_of(view)
    fronts = view.fronts[0]
    plots = [front_plot(view), *curve_figures(view, fronts), overfitting_figure(view, fronts)]
    assert labels.peak is None
    for plot in plots:
        assert "the peak learning rates of its phases" in plot.caption
        for size in (WIDE, NARROW):
            figure = plot.draw(size)
            named = [text.get_text() for axes in figure.axes for text in axes.texts]
            if plot.name == "losses":
                named = [text.get_text() for text in figure.legends[0].get_texts()]
            if plot.name == "overfitting":
                named = [axes.get_title("left") for axes in figure.axes]
            assert named
            assert all(name.endswith(("1e-3", "4e-3")) for name in named)


def test_one_peak_is_said_once(tmp_path):
    arms = {"static": {"rates": [0.1, 0.5]}}
    folder = write_sweep(tmp_path / "sweep", arms, learning_rate={"peaks": [0.004]})
    plot = front_plot(SweepView.of(folder))
    assert "Peak learning rate: 4e-3 everywhere." in plot.caption
    (axes,) = plot.draw(WIDE).axes
    assert {text.get_text() for text in axes.texts} <= {"10%", "50%"}


def test_temperatures_are_shown_with_the_rate_they_give(view):
    names = [labels_of(view)(point.setting) for point in view.fronts[0].points]
    weights = {task: n ** (1 / 3.3) for task, n in TOKENS.items()}
    rate = sum(weights[task] for task in LOW) / sum(weights.values())
    assert f"T = 3.3 ({100 * rate:.2g}%), 4e-3" in names


def test_what_is_outside_is_said_in_the_figure_and_below_it(view):
    (panel,) = loss_panels(view)
    (axes,) = front_plot(view).draw(WIDE).axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    out = [
        mark
        for mark in panel.marks
        if not (left <= mark.x.mean <= right and bottom <= mark.y.mean <= top)
    ]
    assert any(mark.arm == "low-only" for mark in out)
    assert outside_marks(panel) == out
    assert axes.get_title("right").startswith(f"{len(out)} settings outside, 1 at arrowheads")
    heads = [line for line in axes.get_lines() if not line.get_clip_on()]
    assert {line.get_marker() for line in heads} <= set("<>^v")
    assert len(heads) == sum(mark.on_front for mark in out)
    sentence = outside_sentence([panel])
    for mark in out:
        if mark.on_front:
            assert f"{mark.arm} {mark.label} ({mark.x.mean:.2f}, {mark.y.mean:.2f})" in sentence
    assert sentence in front_plot(view).caption


def test_cropped_curves_say_how_far_they_reach(view):
    plot = next(p for p in curve_figures(view, view.fronts[0]) if p.name == "losses")
    for axes in plot.draw(WIDE).axes:
        most = max(
            np.nanmax(line.get_ydata()) for line in axes.get_lines() if len(line.get_xdata()) > 2
        )
        assert axes.get_ylim()[1] < most
        assert axes.get_title("right") == f"cut off: up to {most:.2f}"
    axes = inch_axes(new_figure(4, 3), 0.5, 0.5, 3.5, 2.5)
    axes.set_ylim(1, 2)
    steps = np.arange(3)
    assert cropped_note(axes, [(steps, np.array([1, math.nan, 2]))]) == ""
    assert (
        cropped_note(axes, [(steps, np.array([0.5, 1, 3]))]) == "cut off: up to 3.00, down to 0.50"
    )


def test_only_as_many_lines_as_can_be_told_apart_are_shown(tmp_path):
    arms = {f"arm-{i}": {"kind": "static", "rates": [0.1, 0.25, 0.5]} for i in range(11)}
    view = SweepView.of(write_sweep(tmp_path / "sweep", arms, learning_rate={"peaks": [0.004]}))
    points = view.fronts[0].points
    shown, rest = fewer(points)
    assert (len(shown), len(rest)) == (12, 21)
    assert {point.setting.arm for point in shown} == set(arms)
    plot = overfitting_figure(view, view.fronts[0])
    assert "The other 21 settings are in the table." in plot.caption
    assert len(plot.draw(WIDE).axes) == 12


def test_models_are_joined_where_only_the_model_differs(tmp_path):
    models = {"small": {"layers": 2}, "large": {"layers": 4}}
    folder = write_sweep(tmp_path / "sweep", {"static": {"rates": [0.1, 0.5]}}, models=models)
    view = SweepView.of(folder)
    folder = tmp_path / "numbers"
    write_sweep_numbers(view, folder)
    table = rows(folder, "choices", figure="models")
    (axes, _) = models_plot(view).draw(WIDE).axes
    expected = [(x, y, 0, 0) for x, y in numbers_of(table, "place", "high")]
    assert np.array(bars(axes)) == pytest.approx(np.array(expected))
    joined = [row for row in table if row["line"]]
    assert len({(row["rate"], row["peaks"]) for row in joined}) == 1
    assert {row["model"] for row in joined} == set(models)
