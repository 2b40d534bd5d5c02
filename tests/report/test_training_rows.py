"""The columns of training rows against the rows read one by one."""

import csv
import json
import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from report_support import write_run

from megaphase.report import numbers, training_rows
from megaphase.report.load_run import load_run
from megaphase.report.losses import DIVERGED_STEPS, task_verdicts
from megaphase.report.report import write_report
from megaphase.report.training_rows import TrainingRow, TrainingRowsReader

LOSSES = st.sampled_from([1.5, 2, None, math.inf, math.nan, "3.25"])
VALID = st.fixed_dictionaries(
    {
        "step": st.integers(1, 30),
        "phase": st.sampled_from(["a", "b"]),
        "phase_step": st.integers(1, 10),
        "tokens": st.integers(0, 2**40),
        "loss": LOSSES,
        "loss_by_task": st.dictionaries(st.sampled_from(["en", "hi", "eu"]), LOSSES),
        "learning_rate": st.floats(0, 1),
        "grad_norm": LOSSES,
        "step_seconds": st.floats(0, 1),
        "data_wait_seconds": st.just(0.0),
        "tokens_per_second": st.integers(1, 9),
    },
    optional={"mfu": st.one_of(st.none(), st.floats(0, 1)), "other": st.just(1)},
)
DAMAGE = st.sampled_from(
    [
        ("step", 0),
        ("step", 2**63),
        ("phase_step", -1),
        ("tokens", 2**70),
        ("tokens", -1),
        ("tokens", 1.5),
        ("tokens", "x"),
        ("phase", 3),
        ("step_seconds", None),
        ("loss_by_task", [1.0]),
        ("loss_by_task", {"en": [1.0]}),
        ("loss_by_task", None),
        ("loss", {}),
        ("mfu", "fast"),
    ]
)
ROWS = st.lists(st.tuples(VALID, st.one_of(*[st.none()] * 8, DAMAGE)), max_size=40)


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, at_a_time=st.integers(1, 12))
def test_columns_are_those_of_the_rows_read_one_by_one(rows, at_a_time):
    given_rows = [row | dict([damage]) if damage else row for row, damage in rows]
    expected, unreadable = {}, 0
    for row in given_rows:
        try:
            expected[row["step"]] = TrainingRow.model_validate(row)
        except ValidationError:
            unreadable += 1
    expected = [expected[step] for step in sorted(expected)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_rows, "_ROWS_AT_A_TIME", at_a_time)
        reader = TrainingRowsReader()
        for row in given_rows:
            reader.add(row)
        found = reader.finish()
    assert reader.unreadable == unreadable
    assert len(found) == len(expected)
    assert [found.phases[i] for i in found.phase] == [row.phase for row in expected]
    for name in TrainingRow.model_fields.keys() - {"phase", "loss_by_task"}:
        values = [getattr(row, name) for row in expected]
        values = [math.nan if value is None else value for value in values]
        np.testing.assert_array_equal(getattr(found, name), np.array(values, dtype=float))
    for task in ("en", "hi", "eu"):
        losses = {i: r.loss_by_task[task] for i, r in enumerate(expected) if task in r.loss_by_task}
        indices, values = found.of_task(task)
        assert indices.tolist() == list(losses)
        np.testing.assert_array_equal(values, list(losses.values()))
    for phase in ("a", "b", "c"):
        assert found.are_of(phase).tolist() == [row.phase == phase for row in expected]


def test_tables_of_a_long_run_have_means_of_several_steps(tmp_path, monkeypatch):
    run_dir = write_run(tmp_path / "run")
    monkeypatch.setattr(numbers, "ROWS_OF_TRAINING", 14)  # of 90 rows: 7 steps each
    page = write_report([run_dir], tmp_path / "report")
    assert "7 steps" in page.read_text()
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    metrics = [row for row in metrics if "loss_by_task" in row]

    def table(name):
        with open(page.parent / "numbers" / f"{name}.csv", newline="") as file:
            return list(csv.DictReader(file))

    ends = [*range(7, 60, 7), 60, *range(67, 90, 7), 90]
    rows = table("training")
    assert [int(row["step"]) for row in rows] == ends
    for before, row in zip([0, *ends[:-1]], rows, strict=True):
        of_row = metrics[before : int(row["step"])]
        assert int(row["steps"]) == len(of_row)
        assert row["phase"] == of_row[-1]["phase"]
        assert int(row["tokens"]) == of_row[-1]["tokens"]
        for name in ("loss", "learning_rate", "tokens_per_second"):
            assert float(row[name]) == pytest.approx(fmean(each[name] for each in of_row))
    by_task = table("training_by_task")
    assert len(by_task) == 2 * 9 + 4 * 5
    for row in by_task:
        of_row = metrics[int(row["step"]) - int(row["steps"]) : int(row["step"])]
        assert float(row["loss"]) == pytest.approx(
            fmean(each["loss_by_task"][row["task"]] for each in of_row)
        )


def test_a_training_loss_that_rises_for_some_steps_is_told_with_its_highest(tmp_path):
    run_dir = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    for length, told in ((DIVERGED_STEPS - 1, False), (DIVERGED_STEPS, True)):
        for row in rows:
            if 62 < row["step"] <= 62 + length and "loss_by_task" in row:
                row["loss_by_task"]["hi"] = 50.0 + min(row["step"], 66)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run_dir / "metrics.jsonl").write_text(lines)
        hi = task_verdicts(load_run(run_dir))[0]
        assert (hi.task, hi.rose) == ("hi", told)
        # Of equal losses, the last one.
        assert ("rose to 116.00 at step 72" in hi.sentence) is told
