"""A real small sweep of arms that are given phase by phase, over processes."""

from __future__ import annotations

import math
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from data_support import wait_until
from run_support import LOW, make_corpora, megaphase, read_rows
from sweep_run_support import run_warm, running, settings, write

from megaphase.report.load_run import load_run
from megaphase.sweep.directory import SweepDirectory, load_sweep_record
from megaphase.sweep.pareto.curves import read_runs
from megaphase.sweep.pareto.report import SweepReport
from megaphase.sweep.start import refuse_failures

WSD = {"schedule": "wsd", "decay": 0.3, "final": 0.0}
ARMS: dict[str, Any] = {
    "cascade": {
        "phases": [
            {"share": 0.4, "rate": 0, "learning_rate": WSD},
            {"share": 0.3, "mixture": {"temperature": 2}, "learning_rate": "continue"},
            {"mixture": {"temperature": {"from": 3, "to": 5}}, "learning_rate": "continue"},
        ]
    },
    "two-phase": {"pretrain": [0.6], "rates": [0.4]},
    "average": {
        "phases": [
            {"share": 0.6, "rate": 0},
            {
                "rate": 0.4,
                "average": {"kind": "ema", "decay": 0.5},
                "settings": {"model.dropout": 0.1, "optimizer.weight_decay": 0.2},
            },
        ]
    },
    "longer": {
        "budget": "own",
        "phases": [
            {"share": 0.6, "rate": 0},
            {"steps": 5, "rate": {"from": 0.1, "to": 0.5}, "order": "random"},
            {"steps": 3, "mixture": {"unimax": True, "max_epochs": 50}, "begin_from": "weights"},
        ],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def whole(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepDirectory:
    path = write(tmp_path_factory.mktemp("whole"), settings(corpora, arms=ARMS))
    sweep, directory, outcomes = run_warm(path)
    refuse_failures(sweep, directory, outcomes)
    return directory


def of_arm(directory: SweepDirectory, arm: str) -> Any:
    trials = load_sweep_record(directory.path).trials
    (trial,) = (trial for trial in trials if trial.is_final and trial.arm == arm)
    return trial


def test_each_first_part_is_trained_once(whole: SweepDirectory) -> None:
    trials = load_sweep_record(whole.path).trials
    sources = {trial.arm: trial.source for trial in trials if trial.is_final}
    assert sources["two-phase"] == sources["average"] == "pretrain-0.6-p0.01-s11"
    longer = next(trial for trial in trials if trial.name == sources["longer"])
    assert longer.source == "pretrain-0.6-p0.01-s11"
    assert len(whole.outcomes()) == len(trials) == 1 + 2 + 1 + 4
    for name in whole.outcomes():
        assert len(load_run(whole.run(name)).training)


def test_a_schedule_spans_all_phases_that_continue_it(whole: SweepDirectory) -> None:
    """Over three runs, the rates are those of one WSD schedule."""
    trial = of_arm(whole, "cascade")
    by_name = {each.name: each for each in load_sweep_record(whole.path).trials}
    chain = [by_name[by_name[trial.source].source], by_name[trial.source], trial]
    runs = [load_run(whole.run(each.name)) for each in chain]
    rates = [rate for run in runs for rate in run.training.learning_rate.tolist()]
    peak, warmup, decay, steps = 0.01, 2, 3, 10
    expected = []
    for step in range(steps):
        if step < warmup:
            expected.append(peak * (step + 1) / (warmup + 1))
        else:
            past = max(0, step - (steps - decay))
            expected.append(peak * (1 - past / (decay - 1)))
    assert rates == pytest.approx(expected, abs=1e-12)
    assert [phase["steps"] for phase in trial.phases] == [4, 3, 3]


def test_curves_go_back_to_the_first_phase(whole: SweepDirectory) -> None:
    curves = read_runs(load_sweep_record(whole.path)).curves
    run = curves[of_arm(whole, "cascade").name]
    assert (run.steps[0], run.steps[-1], run.switches) == (0, 10, [4, 7])
    for tokens in run.tokens.values():
        assert list(tokens) == sorted(tokens)
    longer = curves[of_arm(whole, "longer").name]
    assert longer.steps[-1] == 6 + 5 + 3


def test_what_counts_is_the_average(whole: SweepDirectory) -> None:
    trial = of_arm(whole, "average")
    rows = read_rows(whole.run(trial.name))
    last = [row for row in rows if "validation" in row][-1]
    outcome = whole.outcomes()[trial.name]
    curves = read_runs(load_sweep_record(whole.path)).curves[trial.name]
    for task in LOW:
        assert outcome.losses[task] == last["validation_average"][task]["loss"]
        assert outcome.losses[task] != last["validation"][task]["loss"]
        assert curves.validation[task][-1] == outcome.losses[task]
        assert math.isfinite(outcome.losses[task])


def test_the_report_names_budgets_of_their_own(whole: SweepDirectory, tmp_path: Path) -> None:
    report = SweepReport.of(whole.path)
    report.write(tmp_path / "report")
    text = "\n".join(report.sentences())
    assert "longer trains 14 steps, where the budget is 10" in text
    page = (tmp_path / "report" / "index.html").read_text()
    assert "longer trains 14 steps" in page


def test_killed_in_a_phase_in_the_middle_it_resumes(
    whole: SweepDirectory, corpora: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, settings(corpora, arms={"cascade": ARMS["cascade"]}))
    process = subprocess.Popen(megaphase("sweep", path), stdout=subprocess.DEVNULL)
    directory = SweepDirectory(tmp_path / "out")
    middle = directory.run(of_arm(whole, "cascade").source)
    while not any(middle.glob("metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    wait_until(lambda: middle.name not in running(directory))
    assert len(directory.outcomes()) == 1
    run_warm(path)
    expected = whole.outcomes()
    found = directory.outcomes()
    assert len(found) == 3
    assert {name: each.losses for name, each in found.items()} == {
        name: expected[name].losses for name in found
    }
