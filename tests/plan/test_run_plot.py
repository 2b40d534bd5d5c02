"""`megaphase plan --plot`: the picture of a whole run, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from plan_support import FakeTokenizer, build_plan, phase, random_lengths, write_corpus, write_run
from typer.testing import CliRunner

from megaphase.checkpoint.state import CHECKPOINT_FORMAT
from megaphase.plan import run_plot
from megaphase.plan.commands import plan_app
from megaphase.plan.origin import RunOrigin, write_origin
from megaphase.plan.run_plot import BATCH, PANELS, RunCurves, run_curves, run_figure
from megaphase.utils.errors import InputError

PHASES = [
    phase("pretrain", 50, {"rates": {"en": 0.75, "no": 0.25}}),
    phase("joint", 30, {"rates": {"en": 0.5, "hi": 0.5}})
    | {"model": {"seq_len": 16}, "learning_rate": {"peak": 1e-3, "warmup_steps": 10}},
    phase("long", 20, {"rates": {"en": 0.5, "hi": 0.5}}) | {"cut": "documents"},
]


@pytest.fixture
def config(tmp_path):
    for seed, (name, documents) in enumerate([("en", 200), ("hi", 90), ("no", 90)]):
        write_corpus(tmp_path / name, random_lengths(documents, 30, seed), seed=seed)
    return write_run(tmp_path, ["en", "hi", "no"], phases=PHASES)


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr("megaphase.tokenizer.Tokenizer.load", lambda directory: FakeTokenizer())
    return lambda *arguments: CliRunner().invoke(plan_app, [str(a) for a in arguments])


def test_the_curves_are_those_of_the_plan(config):
    plan = build_plan(config)
    curves = run_curves(config, plan, 1000)
    summary = plan.summary()
    assert curves.phases == ["pretrain", "joint", "long"]
    ends = [end - 1 for end in curves.phase_ends]
    assert curves.steps[ends].tolist() == [1050, 1080, 1100]
    assert curves.steps[[0, ends[0] + 1, ends[1] + 1]].tolist() == [1000, 1050, 1080]
    assert np.allclose(curves.rates.sum(1), 1)
    tokens = np.zeros(3)
    for end, figures in zip(ends, summary["phases"], strict=True):
        of_tasks = [figures["tasks"][task] for task in ("en", "hi", "no")]
        tokens += [facts["tokens"] for facts in of_tasks]
        assert np.allclose(curves.tokens[end], tokens)
        assert np.allclose(curves.epochs[end], [facts["epochs_so_far"] for facts in of_tasks])
        assert curves.rates[end].tolist() == [facts["rate"] for facts in of_tasks]
    assert (np.diff(curves.tokens, axis=0) >= 0).all()
    assert (np.diff(curves.epochs, axis=0) > -1e-9).all()
    assert curves.seq_len[ends].tolist() == [8, 16, 8]
    assert set(curves.batch) == {4}
    first = ends[0] + 1  # the warm-up begins again with the phase
    # Step s is drawn at s, which is where it ends; the phase's start has the value of its first.
    rates = [1e-3 / 11, 1e-3 / 11, 2e-3 / 11, 3e-3 / 11]
    assert np.allclose(curves.learning_rate[first : first + 4], rates)
    assert curves.learning_rate[-1] < curves.learning_rate[-2]  # no value is drawn twice


def test_a_ramp_is_drawn_over_the_steps_that_have_its_batch(config):
    ramp = {"samples": 8, "ramp": {"from": 4, "step": 4, "tokens": 160}}
    grown = phase("grown", 10, {"rates": {"en": 1.0}}) | {"batch": ramp}
    plan = build_plan(config := write_run(config.path.parent, ["en"], phases=[grown]))
    curves = run_curves(config, plan, 0)
    sizes = [plan.spec.phases[0].batch.samples_at(step) for step in range(10)]
    assert len(set(sizes)) == 2
    assert curves.batch.tolist() == [sizes[0], *sizes]
    (line,) = run_figure(curves).axes[PANELS.index(BATCH)].get_lines()
    assert line.get_drawstyle() == "steps-pre"


def test_all_panels_have_the_same_ticks_and_the_legend_is_in_the_order_of_the_stack(config):
    curves = run_curves(config, build_plan(config), 0)
    figure = run_figure(curves)
    FigureCanvasAgg(figure).draw()
    bottom = figure.axes[-1].get_xticks().tolist()
    assert all(axes.get_xticks().tolist() == bottom for axes in figure.axes)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == curves.tasks[::-1]


@pytest.mark.parametrize(
    ("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")]
)
def test_the_command_writes_a_picture(config, command, tmp_path, suffix, begin):
    path = tmp_path / f"run{suffix}"
    result = command(config.path, "--plot", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(begin)
    assert f"Plot: {path}" in result.stdout
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    if suffix == ".svg":
        text = path.read_text()
        for word in ["pretrain", "joint", "long", "hi", *(panel.title for panel in PANELS)]:
            assert word in text


def test_the_steps_of_a_branch_count_those_before_it(config, command, tmp_path, monkeypatch):
    """Both before it has begun, when there is no origin.json, and afterwards."""
    at = {"step": 700, "tokens": 700 * 32}
    state = {"format": CHECKPOINT_FORMAT, "position": at, "used": {"en": 2800}, "phase_name": "a"}
    checkpoint = tmp_path / "base" / "checkpoints" / "step-00000700"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(state))
    drawn: list[RunCurves] = []
    monkeypatch.setattr(run_plot, "run_figure", lambda curves: drawn.append(curves))
    monkeypatch.setattr(run_plot, "save_plot", lambda figure, path: None)
    result = command(config.path, "--from", checkpoint, "--plot", tmp_path / "p.svg")
    assert result.exit_code == 0, result.exception
    write_origin(config.output, RunOrigin(700, {"en": 2800}, 22_400, "base@a", checkpoint))
    assert command(config.path, "--plot", tmp_path / "p.svg").exit_code == 0
    assert [curves.steps[[0, -1]].tolist() for curves in drawn] == 2 * [[700, 800]]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("run.jpg", "run.jpg ends in none of .png, .svg, .pdf"),
        ("run", "run ends in none of .png, .svg, .pdf"),
        ("nowhere/run.png", "nowhere/run.png cannot be written"),
        ("run.yaml/run.png", "run.yaml/run.png cannot be written"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_built(
    config, command, tmp_path, name, problem
):
    result = command(config.path, "--plot", tmp_path / name)
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith("--plot: ")
    assert problem in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not config.output.exists()


def made_up(tasks: int, phases: int) -> RunCurves:
    """Return curves of a run with long names."""
    random = np.random.default_rng(tasks)
    points = 3 * phases
    rates = random.random((points, tasks)) + 0.01
    rates /= rates.sum(1, keepdims=True)
    tokens = np.cumsum(1e9 * rates, axis=0)
    return RunCurves(
        [f"task-{i}-{'x' * (i % 40)}$" for i in range(tasks)],
        [f"phase-{i}-{'y' * 30}" for i in range(phases)],
        np.repeat(np.arange(phases), 3) * 100.0 + np.tile([0.0, 50.0, 100.0], phases),
        [3 * (i + 1) for i in range(phases)],
        rates,
        tokens / 1e9,
        tokens,
        np.full(points, 3e-4),
        np.full(points, 1024.0),
        np.full(points, 4096.0),
    )


@pytest.mark.parametrize(("tasks", "phases"), [(1, 1), (3, 4), (9, 2), (100, 30)])
def test_nothing_is_cut_off_with_any_number_of_tasks_and_phases(tasks, phases):
    figure = run_figure(made_up(tasks, phases))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    whole = figure.bbox
    axes = figure.axes[0]
    legend = axes.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == min(tasks, 8) + (tasks > 8)
    for part in [legend, *axes.texts, *(each.title for each in figure.axes)]:
        box = part.get_window_extent(canvas.get_renderer())
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1
    assert len(axes.texts) <= 12
