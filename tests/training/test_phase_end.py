"""Phases that end before their length is reached, and the best weights, in real runs."""

import json
import shutil
from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest
from rounding import approx_sum
from run_support import copy_run, make_corpora, read_rows, run_settings, timeless, write_run_file
from warm_commands import run, run_killed, run_well

from megaphase.config.load import load_run_file
from megaphase.plan.build import ensure_built
from megaphase.plan.plan import Plan
from megaphase.plan.run_history import phase_spans, read_history
from megaphase.plan.spec import plan_spec
from megaphase.plan.trace import trace_step
from megaphase.tokenizer import Tokenizer

GOAL = {"alda": 5.4, "boreth": 5.8}
PATIENCE, MIN_GAIN = 2, 0.01
WEIGHTS = {"cimri": 2.0, "alda": 1.0}
EPOCHS = 0.25
EVERY = 3
LONG = 150  # steps that no phase of these runs reaches


def settings_of(corpora: Path, **lengths: dict):
    """Return three phases; `lengths` replace their ends."""

    def phase(name, mixture, peak, **length):
        rate = {"schedule": "constant", "peak": peak, "warmup_steps": 2}
        length = lengths.get(name, length)
        return {"name": name, "mixture": {"rates": mixture}, "learning_rate": rate, **length}

    overfit = {"tasks": ["cimri"], "patience": PATIENCE, "min_gain": MIN_GAIN}
    return run_settings(
        corpora,
        phases=[
            phase("goal", {"alda": 0.75, "boreth": 0.25}, 1e-2, steps=LONG, stop={"loss": GOAL}),
            phase("low", {"cimri": 1.0}, 5e-2, steps=LONG, stop={"overfit": overfit}),
            phase("joint", {"alda": 0.5, "cimri": 0.5}, 5e-3, epochs={"cimri": EPOCHS}),
        ],
        validation={"every_steps": EVERY, "samples": 10, "fraction": 0.1},
        monitor={"tasks": list(WEIGHTS), "weights": WEIGHTS},
    )


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def run_dir(corpora, tmp_path_factory):
    """Return the directory of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("ending") / "a"
    run_well("train", write_run_file(folder, settings_of(corpora)))
    return folder / "run"


@pytest.fixture(scope="module")
def rows(run_dir):
    return read_rows(run_dir)


@pytest.fixture(scope="module")
def ends(rows):
    """Return the last step of every phase, and why it was the last."""
    return {
        row["phase"]: (row["step"], row["reason"])
        for row in rows
        if row.get("event") == "phase_end"
    }


@pytest.fixture(scope="module")
def traced(run_dir):
    """Return the samples of every step of the run from `plan trace`, by step."""
    config = load_run_file(run_dir.parent / "run.yaml")
    spec = plan_spec(config, Tokenizer.load(config.tokenizer))
    plan = Plan(spec, ensure_built(spec, run_dir))
    return trace_all(run_dir, plan)


def trace_all(run_dir, plan):
    spans = phase_spans(run_dir, read_history(run_dir), plan, 0)
    assert [span.before for span in spans] == [0, *accumulate(span.steps for span in spans)][:-1]
    places = [(phase, i + 1) for phase, span in enumerate(spans) for i in range(span.steps)]
    return {
        step: trace_step(plan, phase, i, spans[phase].starts)
        for step, (phase, i) in enumerate(places, 1)
    }


def held_out(rows, phase=None):
    """Return (step, losses by task) of every validation."""
    return [
        (row["step"], {task: figures["loss"] for task, figures in row["validation"].items()})
        for row in rows
        if "validation" in row and phase in (None, row["phase"])
    ]


def test_a_loss_that_is_reached_ends_the_phase(rows, ends):
    reached = [
        step
        for step, losses in held_out(rows, "goal")
        if step and all(losses[task] <= goal for task, goal in GOAL.items())
    ]
    assert ends["goal"] == (
        reached[0], "the loss of alda reached 5.4, the loss of boreth reached 5.8",
    )  # fmt: skip
    assert EVERY < reached[0] < LONG
    assert len(reached) == 1


def test_overfitting_ends_the_phase_after_its_patience(rows, ends):
    measured = [(step, losses["cimri"]) for step, losses in held_out(rows, "low")]
    best_step, best = measured[0]
    without_gain = 0
    for number, (step, loss) in enumerate(measured[1:], 2):
        without_gain += 1
        if loss < best - MIN_GAIN:
            best_step, best, without_gain = step, loss, 0
        assert (without_gain >= PATIENCE) == (number == len(measured))
    assert ends["low"] == (
        measured[-1][0],
        f"cimri has overfit: no gain for 2 validations (best {best:.4f} at step {best_step})",
    )
    assert best_step > measured[0][0], "it has learnt before it overfits"
    assert ends["low"][0] - ends["goal"][0] < LONG


def test_epochs_of_a_task_end_the_phase(ends, traced):
    end, reason = ends["joint"]
    assert reason == "its length is reached"
    of_cimri = [s for step in traced.values() for s in step if s.task == "cimri"]
    joint = [s for step in range(ends["low"][0] + 1, end + 1) for s in traced[step]]
    wanted = EPOCHS * of_cimri[0].of
    seen = sum(sample.task == "cimri" for sample in joint)
    assert wanted <= seen < wanted + 4  # 4 of the task's samples a step
    assert max(traced) == end


def test_streams_go_on_where_the_phase_that_ended_early_stopped(run_dir, ends, traced):
    seen = Counter()
    for samples in traced.values():
        for sample in sorted(samples, key=lambda sample: sample.ordinal):
            assert sample.ordinal == seen[sample.task]
            seen[sample.task] += 1
    state = json.loads((run_dir / "checkpoints" / "latest" / "state.json").read_text())
    assert state["used"] == dict(seen)
    for step in (ends["goal"][0] + 1, ends["low"][0] + 1):
        said = run_well("plan", "trace", run_dir.parent / "run.yaml", "--step", step, "--json")
        found = [json.loads(line) for line in said.splitlines()]
        assert [(s["task"], s["ordinal"]) for s in found] == [
            (s.task, s.ordinal) for s in traced[step]
        ]


def test_where_phases_ended_does_not_depend_on_the_log(run_dir, ends, traced, tmp_path):
    config = load_run_file(run_dir.parent / "run.yaml")
    spec = plan_spec(config, Tokenizer.load(config.tokenizer))
    plan = Plan(spec, ensure_built(spec, run_dir))
    copy = copy_run(run_dir.parent, tmp_path / "a").parent / "run"
    (copy / "metrics.jsonl").unlink()
    history = read_history(copy)
    assert history.doubt is None
    assert {phase.name: (phase.ended_after, phase.reason) for phase in history.phases} == ends
    assert trace_all(copy, plan) == traced
    # Without the ends and the starts: as written by an earlier version, with its metrics.
    shutil.copy(run_dir / "metrics.jsonl", copy)
    without_history(copy)
    assert trace_all(copy, plan) == traced
    doubt = read_history(copy).doubt
    assert doubt is not None
    assert "was written by an earlier version" in doubt
    said = run("plan", "trace", copy, "--step", ends["goal"][0] + 1, "--json")
    assert said.returncode == 0, said.stderr
    assert doubt in said.stderr
    # The checkpoints at the ends of phases also record their steps.
    (copy / "metrics.jsonl").unlink()
    assert trace_all(copy, plan) == traced


def without_history(run_dir):
    for path in (run_dir / "checkpoints").glob("*-*/state.json"):
        state = json.loads(path.read_text())
        del state["history"], state["metrics_hash"]
        path.write_text(json.dumps(state))


def test_it_is_the_run_that_was_told_these_lengths(corpora, rows, ends, tmp_path):
    """The batches too: of a run whose plan has the phases with their actual lengths."""
    first, second, third = (step for step, _ in ends.values())
    settings = settings_of(
        corpora,
        goal={"steps": first},
        low={"steps": second - first},
        joint={"steps": third - second},
    )
    run_well("train", write_run_file(tmp_path / "told", settings))
    told = timeless(read_rows(tmp_path / "told" / "run"))
    for row in (expected := timeless(rows)):
        if row.get("event") == "phase_end":
            row["reason"] = "its length is reached"
    assert told == expected


def test_the_checkpoint_at_the_end_of_a_phase_stays(run_dir, ends):
    for phase, (step, _) in ends.items():
        state = json.loads(
            (run_dir / "checkpoints" / f"step-{step:08d}" / "state.json").read_text()
        )
        assert (state["permanent"], state["phase_name"]) == (True, phase)
    names = {p.name for p in (run_dir / "checkpoints").iterdir() if not p.is_symlink()}
    kept = {f"step-{step:08d}" for step, _ in ends.values()}
    assert len({name for name in names if name.startswith("step-")} - kept) <= 1 + len(WEIGHTS)


def bests(rows):
    """Return step and losses of the best validation of each monitored task, and of the mean."""
    measured = held_out(rows)

    def mean(losses):
        return (2 * losses["cimri"] + losses["alda"]) / 3

    return {
        "cimri": min(measured, key=lambda each: each[1]["cimri"]),
        "alda": min(measured, key=lambda each: each[1]["alda"]),
        "mean": min(measured, key=lambda each: mean(each[1])),
    }


@pytest.mark.parametrize("name", ["cimri", "alda", "mean"])
def test_the_best_weights_have_the_loss_that_was_recorded(run_dir, rows, name):
    step, losses = bests(rows)[name]
    found = json.loads(
        run_well("evaluate", run_dir.parent / "run.yaml", "--checkpoint", f"best-{name}", "--json")
    )
    assert found["step"] == step
    assert {task: each["loss"] for task, each in found["validation"].items()} == losses


def test_the_gap_is_that_of_the_validation_and_the_training_rows(rows, traced):
    """Of the rows since the validation before; a sample's first token is not a target."""
    tokens: Counter[str] = Counter()
    nats: Counter[str] = Counter()
    checked = 0
    for row in rows:
        if "loss_by_task" in row:
            scored: Counter[str] = Counter()
            for sample in traced[row["step"]]:
                scored[sample.task] += sum(p.last - p.first for p in sample.pieces) - 1
            assert scored.keys() == row["loss_by_task"].keys()
            for task, loss in row["loss_by_task"].items():
                tokens[task] += scored[task]
                nats[task] += loss * scored[task]
        if "validation" in row:
            for task, figures in row["validation"].items():
                assert ("gap" in figures) == (task in tokens)
                if task in tokens:
                    loss, trained = figures["loss"], nats[task] / tokens[task]
                    assert figures["gap"] == approx_sum(loss - trained, loss, trained, rel=1e-12)
                    checked += 1
            tokens.clear()
            nats.clear()
    assert checked > 10


def test_killed_before_its_early_end_and_after_it_the_run_is_the_same(
    run_dir, rows, ends, tmp_path
):
    """The first kill is after one validation without a gain, the second during the switch."""
    folder = tmp_path / "killed"
    folder.mkdir()
    run_file = folder / "run.yaml"
    run_file.write_text((run_dir.parent / "run.yaml").read_text())
    checkpoints = folder / "run" / "checkpoints"
    end = ends["low"][0]
    often = ("checkpoint.every_steps=1", "checkpoint.asynchronous=false")
    run_killed(run_file, *often, before_step=end)
    state = json.loads((checkpoints / "latest" / "state.json").read_text())
    assert state["monitor"]["watches"]["cimri"]["without_gain"] == PATIENCE - 1
    run_killed(run_file, before_step=end + 1)
    run_well("train", run_file)
    assert without_saves(read_rows(folder / "run")) == without_saves(rows)
    for name in ("best-cimri", "best-alda", "best-mean"):
        steps = {
            json.loads((each / "checkpoints" / name / "state.json").read_text())["step"]
            for each in (run_dir, folder / "run")
        }
        assert len(steps) == 1
    assert not any(checkpoints.glob(".*"))


def without_saves(rows):
    return [row for row in timeless(rows) if row.get("event") != "checkpoint"]
