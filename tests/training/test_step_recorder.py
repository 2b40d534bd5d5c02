"""Figures of a step that are read while the next one computes, as on a GPU: the same rows."""

import math
from functools import partial

import pytest
import torch
from run_support import make_corpora, read_rows, run_settings, timeless, write_run_file
from warm_commands import run, run_killed, run_well

from megaphase.callbacks.throughput import ThroughputReference
from megaphase.plan.position import StreamPosition
from megaphase.training import step_recorder
from megaphase.training.step_recorder import StepRecorder
from megaphase.training.step_result import StepResult
from megaphase.training.train_state import TrainState

BAD_STEP, KILLED_BEFORE = 7, 12


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def prepare_run(one_later: bool, not_finite: list[int]) -> None:
    """In a run's process: say when figures are read, and make the losses of these steps NaN."""
    from megaphase.training.engine import Engine

    build, train_step, forward = StepRecorder.__init__, Engine.train_step, Engine._forward
    now = [0]

    def built(recorder, *arguments, **options):
        build(recorder, *arguments, **{**options, "one_later": one_later})

    def noting_step(engine, batch, learning_rate, step, progress):
        now[0] = step
        result = train_step(engine, batch, learning_rate, step, progress)
        now[0] = 0
        return result

    def spoiled(engine, micro, dropout_seeds):
        factor = math.nan if now[0] in not_finite else 1.0
        total, losses = forward(engine, micro, dropout_seeds)
        return total * factor, losses * factor

    StepRecorder.__init__, Engine.train_step, Engine._forward = built, noting_step, spoiled


def rows_of(run_file):
    """Return the rows of a run without times and paths."""
    rows = timeless(read_rows(run_file.parent / "run"))
    return [{key: value for key, value in row.items() if key != "trace"} for row in rows]


@pytest.mark.parametrize("zero", [0, 1])
def test_the_rows_are_those_of_figures_that_are_read_at_once_also_after_a_kill(
    zero, corpora, tmp_path
):
    settings = run_settings(corpora, parallel={"tensor": 1, "zero": zero})
    settings["checkpoint"]["asynchronous"] = False
    files = [write_run_file(tmp_path / name, settings) for name in ("at_once", "later", "killed")]
    at_once, later = (partial(prepare_run, each, [BAD_STEP]) for each in (False, True))
    run_well("train", files[0], prepare=at_once)
    run_well("train", files[1], prepare=later)
    run_killed(files[2], before_step=KILLED_BEFORE, prepare=later)
    run_well("train", files[2], prepare=later)
    expected, *others = map(rows_of, files)
    assert [row["step"] for row in expected if "skipped" in row] == [BAD_STEP]
    assert others == [expected, expected]


def test_too_many_skipped_steps_end_the_run_with_the_same_rows_and_words(corpora, tmp_path):
    settings = run_settings(corpora, faults={"skip_batches": 1})
    found = []
    for one_later in (False, True):
        run_file = write_run_file(tmp_path / str(one_later), settings)
        result = run("train", run_file, prepare=partial(prepare_run, one_later, [2, 3, 4]))
        said = result.stderr.replace(str(run_file.parent), "")
        found.append((result.returncode, said, rows_of(run_file)))
    assert found[0] == found[1]
    assert found[0][0] == 1
    assert "pretrain step 3" in found[0][1]


def test_a_run_that_diverges_ends_one_step_later_and_is_not_started_again(corpora, tmp_path):
    rate = {"schedule": "constant", "peak": 5.0, "warmup_steps": 2}
    phase = {"name": "only", "steps": 50, "mixture": {"temperature": 3.0}, "learning_rate": rate}
    settings = run_settings(
        corpora,
        phases=[phase],
        optimizer={"clip": 0},
        validation={"every_steps": 1000, "samples": 4, "fraction": 0.1},
        checkpoint={"every_steps": 1000},
    )
    stops, tellings = [], []
    for one_later in (False, True):
        run_file = write_run_file(tmp_path / str(one_later), settings)
        prepare = partial(prepare_run, one_later, [])
        result = run("train", run_file, prepare=prepare)
        assert result.returncode == 1
        rows = read_rows(run_file.parent / "run")
        tellings.append([row for row in rows if row.get("event") == "divergence"])
        (stop,) = (row["step"] for row in rows if row.get("event") == "divergence_stop")
        assert stop == max(row["step"] for row in rows if "loss_by_task" in row)
        assert run("train", run_file, prepare=prepare).stderr == result.stderr
        stops.append(stop)
    assert stops[1] == stops[0] + 1
    assert tellings[0] == tellings[1] != []


@pytest.mark.parametrize("one_later", [False, True])
def test_no_time_counts_twice_and_none_is_lost(one_later, monkeypatch):
    """Each step: 1 s for its batch, 2 s to launch it, 3 s until it is launched again."""
    now = [0.0]
    monkeypatch.setattr(step_recorder.time, "perf_counter", lambda: now[0])
    recorder = StepRecorder(["a"], ThroughputReference((1,), None), one_later=one_later)
    state = TrainState(0, 0, 0, 0, (StreamPosition(),))
    records = []
    for _ in range(3):
        now[0] += 1.0
        state, began = state.after_step(64), now[0]
        now[0] += 2.0
        figures = torch.tensor([4.0 * state.step]).double(), torch.tensor([4.0]).double()
        result = StepResult(*figures, torch.tensor(2.0))
        records.append(
            recorder.add(
                *(result, state, "only", 0.1),
                samples=4,
                tokens=64,
                began=began,
                data_wait=1.0,
                save=0.0,
            )
        )
        now[0] += 3.0
    records.append(recorder.finish())
    assert recorder.finish() is None
    given = [record for record in records if record is not None]
    assert [record.step for record in given] == [1, 2, 3]
    assert [record.loss for record in given] == [1.0, 2.0, 3.0]
    assert (records[0] is None) == one_later
    between = 3.0 if one_later else 0.0
    assert [r.seconds.train for r in given] == [2.0, 2.0 + between, 2.0 + between]
    assert given[1].tokens_per_second == 64 / given[1].seconds.total
