"""The command on the directory of a sweep, and the section of the report."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from sweep_support import HIGH, LOW, TOKENS, TWO_PHASE, write_sweep

from megaphase.config.load import load_run_file
from megaphase.report.load_run import load_run
from megaphase.sweep.directory import load_sweep_record
from megaphase.sweep.law.rows import FORGETTING, OTHER_VALUES, OTHER_WEIGHTS, law_rows
from megaphase.sweep.law.sweep_law import combined
from megaphase.sweep.law.table import setting_groups
from megaphase.sweep.pareto.report import SweepReport
from megaphase.sweep.trials import known_trials
from megaphase.utils.errors import InputError

ARMS = {
    "static": {"rates": [0.05, 0.1, 0.25, 0.5]},
    "two-phase": TWO_PHASE,
    "low-only": {"pretrain": [0.8]},
    "dropout": {"kind": "regularized", "rates": [0.1], "settings": {"model.dropout": 0.1}},
    "early": {"kind": "regularized", "rates": [0.1], "early_stopping": 2},
}
BIG = {
    "output": "big",
    "tokenizer": "tok",
    "tasks": {task: {"corpus": f"data/{task}"} for task in TOKENS},
    "model": {"preset": "gpt-1m", "seq_len": 64},
    "batch": {"samples": 8},
    "phases": [
        {"name": "all", "steps": 60, "mixture": {"proportional": True},
         "learning_rate": {"peak": 0.001}},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "sweep", ARMS, seeds=[1, 2])


def run(*arguments, cwd):
    command = [sys.executable, "-m", "megaphase", "recommend", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_settings_with_other_values_in_one_of_their_phases_have_no_rows(tmp_path):
    last = {"rate": 0.1}
    arms = {
        "static": {"rates": [0.1]},
        "weighted": {"phases": [last | {"loss_weights": {"hi": 2}}]},
        "decayed": {
            "phases": [
                {"share": 0.5, "rate": 0.1, "settings": {"optimizer.weight_decay": 0.3}},
                last,
            ]
        },
        "averaged": {
            "phases": [
                {"share": 0.5, "rate": 0.2, "average": {"kind": "ema", "decay": 0.9}},
                last | {"begin_from": "average"},
            ]
        },
        "plain": {"phases": [{"share": 0.5, "rate": 0.2}, last | {"order": "balanced"}]},
    }
    record = load_sweep_record(write_sweep(tmp_path / "sweep", arms, seeds=[1, 2]))
    # Every run uploads its own checkpoints, which says nothing of its losses.
    base = record.sweep.base | {"checkpoint": {"upload": "s3://bucket/runs"}}
    sweep = record.sweep.model_copy(update={"base": base})
    found = law_rows(replace(record, sweep=sweep, trials=known_trials(sweep, record.outcomes)))
    assert found.left_out == {OTHER_VALUES: 3 * 2}  # two peaks each
    assert {row.setting.arm for row in found.rows} == {"static", "plain"}


def test_rows_have_what_the_runs_did(sweep):
    found = law_rows(load_sweep_record(sweep))
    assert found.left_out == {OTHER_VALUES: 2, OTHER_WEIGHTS: 2, FORGETTING: 2}  # two peaks each
    assert {row.setting.arm for row in found.rows} == {"static", "two-phase"}
    assert len(found.rows) == (4 + 3) * 2 * 2
    for row in found.rows:
        assert row.steps == 60
        assert row.total_tokens == pytest.approx(60 * 8 * 64, rel=1e-3)
        assert set(row.losses) == {*HIGH, *LOW}
        for task in TOKENS:
            assert row.epochs(task) == row.tokens(task) / TOKENS[task]
        if row.setting.arm == "two-phase":
            first, last = row.phases
            assert (first.steps, last.steps) == (48, 12)
            assert first.rate(LOW) == 0
            assert last.rate(LOW) == pytest.approx(row.setting.get("rate"), abs=1e-3)
            assert last.reset
            assert last.end == pytest.approx(0.1)


def test_padding_is_no_repetition(sweep):
    record = load_sweep_record(sweep)
    phases = {
        trial.name: [
            phase.model_copy(
                update={
                    "tasks": {  # as if a fifth of every sample were padding
                        task: share.model_copy(update={"epochs": 0.8 * share.epochs})
                        for task, share in phase.tasks.items()
                    }
                }
            )
            for phase in load_run(record.directory.run(trial.name)).plan.phases
        ]
        for trial in record.trials
    }
    for row in law_rows(record, phases).rows:
        for task, text in TOKENS.items():
            assert row.epochs(task) == pytest.approx(0.8 * row.tokens(task) / text, rel=1e-3)


def test_sweeps_of_one_name_stay_apart_and_none_counts_twice(sweep, tmp_path):
    other = write_sweep(tmp_path / "sweep", ARMS, seeds=[1, 2])
    both = combined([sweep, other], [load_sweep_record(each) for each in (sweep, other)])
    assert len(setting_groups(both.rows)) == 2 * len(
        setting_groups(law_rows(load_sweep_record(sweep)).rows)
    )
    assert {row.sweep for row in both.rows} == {str(sweep), str(other)}
    (tmp_path / "link").symlink_to(sweep)
    with pytest.raises(InputError, match="link: is given twice"):
        combined([sweep, tmp_path / "link"], [load_sweep_record(sweep)] * 2)


def test_arms_that_forget_are_left_out_however_their_mixture_is_given(tmp_path):
    arms = {
        "static": {"rates": [0.1]},
        "over-low": {"phases": [{"mixture": {"temperature": 1, "over": list(LOW)}}]},
    }
    found = law_rows(load_sweep_record(write_sweep(tmp_path / "sweep", arms, seeds=[1])))
    assert found.left_out == {FORGETTING: 2}
    assert {row.setting.arm for row in found.rows} == {"static"}


@pytest.mark.slow
def test_the_report_has_the_law_and_the_same_bytes_again(sweep, tmp_path):
    files = []
    for name in ("one", "two"):
        index = SweepReport.of(sweep).write(tmp_path / name)
        page = index.read_text()
        assert "<h3>Law</h3>" in page
        assert "There is one model size" in page
        assert "Left out: 2 settings with other values of the run file." in page
        folder = tmp_path / name
        files.append({path.relative_to(folder): path.read_bytes()
                      for path in sorted(folder.rglob("*")) if path.is_file()})  # fmt: skip
    assert files[0] == files[1]
    numbers = tmp_path / "one" / "numbers"
    predictions = list(csv.DictReader((numbers / "law_predictions.csv").open()))
    assert len(predictions) == 14 * 4
    forms = list(csv.DictReader((numbers / "law_forms.csv").open()))
    assert [row["task"] for row in forms if row["chosen"] == "True"] == [*HIGH, *LOW]


def test_a_recommendation_is_written(sweep, tmp_path):
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(BIG))
    options = ["--run", "big.yaml", "--target", "{low: min, high: within 0.1}", "--out", "new.yaml"]
    tokens = [f"--epoch-tokens={task}={count}" for task, count in TOKENS.items()]
    ended = run(sweep, *options, *tokens, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "Predicted validation losses" in ended.stdout
    config = load_run_file(tmp_path / "new.yaml")
    assert sum(phase.steps for phase in config.phases) == 60
    before = (tmp_path / "new.yaml").read_bytes()
    again = run(sweep, *options, *tokens, cwd=tmp_path)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert (tmp_path / "new.yaml").read_bytes() == before
    same = run(sweep, *options[:-1], "same.yaml", *tokens, cwd=tmp_path)
    assert same.returncode == 0
    assert (tmp_path / "same.yaml").read_bytes() == before


@pytest.mark.slow
def test_the_laws_have_a_page_of_their_own_even_where_nothing_is_recommended(sweep, tmp_path):
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(BIG))
    tokens = [f"--epoch-tokens={task}={count}" for task, count in TOKENS.items()]
    options = ["--run", "big.yaml", "--out", "new.yaml", "--report", "laws", *tokens]
    ended = run(sweep, *options, "--steps", "90", "--target", "{high: min}", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[0] == "Laws: laws/index.html"
    page = (tmp_path / "laws" / "index.html").read_text()
    assert "28 runs" in page
    assert (tmp_path / "laws" / "plots" / "law.png").is_file()
    predictions = csv.DictReader((tmp_path / "laws" / "numbers" / "law_predictions.csv").open())
    assert len(list(predictions)) == 14 * 4
    (tmp_path / "laws" / "notes.txt").write_text("mine")
    ended = run(sweep, *options, "--target", "{high: min}", cwd=tmp_path)
    assert ended.returncode == 2
    assert "notes.txt, which is not part of a report; give --report a new directory" in ended.stderr


def test_what_is_wrong_is_one_line(sweep, tmp_path):
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(BIG))
    options = ["--run", "big.yaml", "--out", "new.yaml"]
    tokens = [f"--epoch-tokens={task}={count}" for task, count in TOKENS.items()]
    for target, code, words in [
        ("{xx: min}", 2, "--target: xx: no such task or group"),
        ("{hi: low}", 2, "--target: hi: 'low' is no target"),
        ("{hi: min, high: within 0, eu: within 0, fr: within 0}", 1, "no recipe within"),
    ]:
        ended = run(sweep, *options, "--target", target, *tokens, cwd=tmp_path)
        assert ended.returncode == code
        assert words in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
    longer = ["--steps", "90", "--target", "{high: min}"]
    ended = run(sweep, *options, *longer, *tokens, cwd=tmp_path)
    assert ended.returncode == 1
    assert "the sweep has one budget" in ended.stderr
    ended = run(sweep, *options, "--target", "{hi: min}", cwd=tmp_path)
    assert ended.returncode == 2
    assert "--epoch-tokens en=N" in ended.stderr
    assert not Path(tmp_path / "new.yaml").exists()
