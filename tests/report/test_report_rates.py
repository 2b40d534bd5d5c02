"""The report of a run with a phase whose rates change."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from report_support import PHASES, SAMPLES, Page, write_run

from megaphase.report.load_run import load_run
from megaphase.report.plots import rates_plot
from megaphase.report.report import write_report
from megaphase.utils.plot_style import Size

STEPS = 30
EDGES = [0, 5, 10, 20, STEPS]


def write_curved(run_dir: Path) -> Path:
    """Write a run in whose second phase hi rises from 0 to 0.3, at the expense of en."""
    write_run(run_dir)
    path = run_dir / "plan.json"
    plan = json.loads(path.read_text())
    hi = [0.3 * (a + b) / 2 / STEPS for a, b in pairwise(EDGES)]
    plan["phases"][1]["rates_over_steps"] = {
        "steps": EDGES,
        "samples": [SAMPLES * step for step in EDGES],
        "rates": {
            "en": [0.6 - rate for rate in hi],
            "fr": [0.3] * 4,
            "hi": hi,
            "eu": [0.1] * 4,
        },
    }
    path.write_text(json.dumps(plan))
    return run_dir


def test_the_rates_are_plotted(tmp_path):
    run_dir = write_curved(tmp_path / "curved")
    index = write_report([run_dir], tmp_path / "report")
    assert "plots/rates.png" in Page(index).links
    plain = write_report([write_run(tmp_path / "plain")], tmp_path / "other")
    assert "plots/rates.png" not in Page(plain).links
    run = load_run(run_dir)
    figure = rates_plot(run, dict.fromkeys(run.tasks, "#123456"), Size(7.0, 3.5, False))
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 6]
    assert len(lines) == 4
    [rising] = [line for line in lines if line.get_ydata()[-1] == pytest.approx(0.25)]
    assert list(rising.get_xdata()) == [60, 62.5, 67.5, 75, 85, 90]
    assert rising.get_ydata() == pytest.approx(np.array([0.025, 0.025, 0.075, 0.15, 0.25, 0.25]))


@pytest.mark.parametrize(("steps", "rate"), [(20, 0.1), (15, 0.3 * 7.5 / STEPS), (0, 0)])
def test_a_phase_with_a_curve_that_ended_early_has_the_samples_until_then(tmp_path, steps, rate):
    run_dir = write_curved(tmp_path / "early")
    path = run_dir / "metrics.jsonl"
    end = PHASES[0][1] + steps
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [row for row in rows if row["step"] <= end and row.get("event") != "phase_end"]
    kept.append({"step": end, "event": "phase_end", "phase": "joint", "reason": "overfit"})
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    joint = load_run(run_dir).plan.phases[1]
    assert joint.rates_over_steps is not None
    assert joint.rates_over_steps.steps[-1] == joint.steps == steps
    assert joint.tasks["hi"].rate == pytest.approx(rate, rel=0.2 if steps == 15 else 1e-9)
    whole = 0.15 * STEPS * SAMPLES
    assert joint.tasks["hi"].samples == round(joint.tasks["hi"].rate * steps * SAMPLES)
    assert joint.tasks["hi"].samples < whole * steps / STEPS or steps == 0
    assert joint.tasks["fr"].samples == round(0.3 * steps * SAMPLES)


def test_a_phase_with_a_ramp_that_ended_early_has_the_samples_of_its_steps(tmp_path):
    """The first ten steps take 2 samples each, the others 8: 20 of 180 after a third."""
    run_dir = write_run(tmp_path / "ramp")
    path = run_dir / "plan.json"
    plan = json.loads(path.read_text())
    joint = plan["phases"][1]
    joint["batch"] = [
        {"first_step": 0, "steps": 10, "samples": 2},
        {"first_step": 10, "steps": 20, "samples": 8},
    ]
    path.write_text(json.dumps(plan))
    metrics = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for steps, part in ((10, 20 / 180), (15, 60 / 180), (30, 1), (0, 0)):
        end = PHASES[0][1] + steps
        kept = [row for row in rows if row["step"] <= end and row.get("event") != "phase_end"]
        kept.append({"step": end, "event": "phase_end", "phase": "joint", "reason": "overfit"})
        metrics.write_text("".join(json.dumps(row) + "\n" for row in kept))
        found = load_run(run_dir).plan.phases[1]
        assert found.tokens == round(joint["tokens"] * part)
        for task, share in joint["tasks"].items():
            assert found.tasks[task].samples == round(share["samples"] * part)
            assert found.tasks[task].epochs == pytest.approx(share["epochs"] * part)
        assert sum(each.steps for each in found.batch) == steps
