"""Diverging runs are detected, reported and ended; learning runs are not affected."""

from pathlib import Path
from statistics import fmean

import pytest
from distributed import launch
from run_support import (
    HIGH,
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)
from warm_commands import run, run_killed, run_well

ALL = {"temperature": 3.0}
BASE_STEPS = 40
EVENTS = ("divergence", "divergence_over", "divergence_stop")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def phase(name, steps, peak, *, warmup=2, mixture=None):
    rate = {"schedule": "constant", "peak": peak, "warmup_steps": warmup}
    return {
        "name": name, "steps": steps, "mixture": mixture or ALL, "learning_rate": rate
    }  # fmt: skip


def settings_of(corpora, *phases, **changes):
    changes = {
        "validation": {"every_steps": 1000, "samples": 4, "fraction": 0.1},
        "checkpoint": {"every_steps": 5, "keep": 1},
        "logging": {"every_steps": 1000, "tensorboard": False},
        **changes,
    }
    return run_settings(corpora, phases=list(phases), **changes)


def events(run_dir: Path, *names: str):
    return [row for row in read_rows(run_dir) if row.get("event") in (names or EVENTS)]


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(run_dir) if "loss" in row}


@pytest.fixture(scope="module")
def base(corpora, tmp_path_factory):
    """Return a healthy run of one phase on the high-resource tasks."""
    first = phase("pretrain", BASE_STEPS, 1e-2, mixture={"proportional": True, "over": list(HIGH)})
    run_file = write_run_file(tmp_path_factory.mktemp("base"), settings_of(corpora, first))
    run_well("train", run_file)
    run_dir = run_file.parent / "run"
    assert events(run_dir) == []
    return run_dir


@pytest.fixture(scope="module")
def branch(corpora, base, tmp_path_factory):
    """Return a branch with a peak a thousand times too high, and how it ended."""
    settings = settings_of(corpora, phase("joint", 60, 3.0))
    run_file = write_run_file(tmp_path_factory.mktemp("branch"), settings)
    return run_file, run("train", run_file, "--from", f"{base}@pretrain")


def test_a_branch_that_diverges_is_told_within_ten_steps_and_ended(branch, base):
    run_file, result = branch
    run_dir = run_file.parent / "run"
    found, stop = events(run_dir)
    assert (found["event"], found["kind"], found["phase"]) == (
        "divergence", "above_uniform", "joint"
    )  # fmt: skip
    assert BASE_STEPS < found["since"] < found["step"] <= BASE_STEPS + 10
    assert found["loss"] == losses(run_dir)[found["step"]] > 6.22 > found["loss_before"]
    source = f"{base}@pretrain"
    assert found["checkpoint"] == source
    assert stop["event"] == "divergence_stop"
    assert stop["step"] == max(losses(run_dir)) < BASE_STEPS + 60
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    rose = f"the loss rose from {found['loss_before']:.4g} at step {found['since']} to "
    assert result.stderr.startswith(
        f"megaphase: joint step {stop['step']}: the run has diverged: {rose}"
    )
    assert f"branch from {source} (--from)" in result.stderr
    assert "optimizer.clip" not in result.stderr  # it clips already
    assert f"joint step {found['step']}  Warning: this diverges: {rose}" in result.stdout


def test_started_again_it_says_so_at_once_and_trains_on_where_it_is_told_to(branch):
    run_file, first = branch
    run_dir = run_file.parent / "run"
    before = (run_dir / "metrics.jsonl").read_bytes()
    again = run("train", run_file)
    assert (again.returncode, again.stderr) == (1, first.stderr)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    run_well("train", run_file, "faults.stop_on_divergence=false")
    assert max(losses(run_dir)) == BASE_STEPS + 60
    assert [row["event"] for row in events(run_dir)] == ["divergence"]
    # Although all steps are done, it counts as diverged.
    assert run("train", run_file).returncode == 1


def test_from_the_first_steps_and_without_clipping(corpora, tmp_path):
    settings = settings_of(corpora, phase("only", 50, 5.0), optimizer={"clip": 0})
    result = run("train", write_run_file(tmp_path, settings))
    assert result.returncode == 1
    found, stop = events(tmp_path / "run")
    assert found["step"] <= 8
    assert found["checkpoint"] is None
    assert stop["step"] < 50
    assert "or set optimizer.clip, and begin again" in result.stdout


def test_the_last_checkpoint_from_before_stays_and_can_be_gone_on_from(corpora, tmp_path):
    """The rate rises until it is too high; of later checkpoints only the newest is kept.

    The loss must not begin to rise within a step of a save, which leaves no checkpoint from before.
    """
    rising = phase("only", 200, 300.0, warmup=10_000)
    rising["learning_rate"]["steps"] = 10_001
    settings = settings_of(corpora, rising, checkpoint={"every_steps": 6, "keep": 1})
    result = run("train", write_run_file(tmp_path / "a", settings))
    run_dir = tmp_path / "a" / "run"
    assert result.returncode == 1
    found = events(run_dir, "divergence")[0]
    sound = 6 * ((found["since"] - 2) // 6)
    assert sound > 6
    assert found["checkpoint"] == f"{run_dir}@step-{sound:08d}"
    kept = {path.name for path in (run_dir / "checkpoints").iterdir() if not path.is_symlink()}
    assert kept == {f"step-{step:08d}" for step in (sound, max(losses(run_dir)))}
    healthy = write_run_file(tmp_path / "b", settings_of(corpora, phase("lower", 20, 1e-2)))
    run_well("train", healthy, "--from", found["checkpoint"])
    assert events(tmp_path / "b" / "run") == []


def test_a_phase_that_ends_diverged_is_the_last_one(corpora, base, tmp_path):
    settings = settings_of(corpora, phase("joint", 9, 3.0), phase("then", 5, 1e-3))
    run_file = write_run_file(tmp_path, settings)
    result = run("train", run_file, "--from", f"{base}@pretrain")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert [row["event"] for row in events(tmp_path / "run")] == ["divergence", "divergence_stop"]
    assert max(losses(tmp_path / "run")) == BASE_STEPS + 9
    again = run("train", run_file)
    assert (again.returncode, again.stderr) == (1, result.stderr)
    run_well("train", run_file, "faults.stop_on_divergence=false")
    assert max(losses(tmp_path / "run")) == BASE_STEPS + 14


def test_a_run_that_learns_nothing_is_ended(corpora, tmp_path):
    settings = settings_of(
        corpora, phase("only", 200, 1e-12), batch={"samples": 2, "micro": 2}
    )  # fmt: skip
    result = run(
        "train",
        write_run_file(
            tmp_path,
            settings,
        ),
    )
    assert result.returncode == 1
    assert "the loss has stayed at 6.2" in result.stderr
    found, stop = events(tmp_path / "run")
    # A hundred steps after the warm-up, unless noise looks like a fall at first.
    assert found["kind"] == "stuck"
    assert 102 <= found["step"] == stop["step"] < 200


def test_killed_while_the_loss_rises_it_finds_the_same(corpora, base, tmp_path):
    """Killed between the first suspicious step and the one at which it is reported."""
    settings = settings_of(
        corpora, phase("joint", 60, 3.0), checkpoint={"every_steps": 1, "keep": 1}
    )
    source = ("--from", f"{base}@pretrain")
    run("train", write_run_file(tmp_path / "a", settings), *source)
    whole = tmp_path / "a" / "run"
    found = events(whole, "divergence")[0]
    assert found["since"] + 1 < found["step"]
    killed = write_run_file(tmp_path / "b", settings)
    run_killed(killed, *source, "checkpoint.asynchronous=false", before_step=found["since"] + 2)
    assert run("train", killed).returncode == 1

    def rows(run_dir):
        return [
            {k: v for k, v in r.items() if k != "checkpoint"} for r in timeless(read_rows(run_dir))
        ]

    assert rows(tmp_path / "b" / "run") == rows(whole)


@pytest.mark.slow
def test_two_tensor_parallel_ranks_end_together(corpora, base, tmp_path):
    settings = settings_of(
        corpora, phase("joint", 60, 3.0), parallel={"tensor": 2, "zero": 1, "overlap": False}
    )
    run_file = write_run_file(tmp_path, settings)
    results = launch(megaphase("train", run_file, "--from", f"{base}@pretrain"), 2)
    assert [result.returncode for result in results] == [1, 1]
    said = "".join(result.stderr for result in results)
    assert said.count("the run has diverged: the loss rose from ") == 1
    assert [row["event"] for row in events(tmp_path / "run")] == ["divergence", "divergence_stop"]


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (1, {}),
        pytest.param(2, {"optimizer": {"clip": 0}}, marks=pytest.mark.slow),
        pytest.param(3, {"precision": "bf16"}, marks=pytest.mark.slow),
        (4, {"batch": {"samples": 1, "micro": 1}}),
        pytest.param(5, {"peaks": (4e-2, 2e-2)}, marks=pytest.mark.slow),
    ],
)
def test_runs_that_learn_are_left_alone(seed, changes, corpora, tmp_path):
    first, second = changes.pop("peaks", (1e-2, 5e-3))
    settings = settings_of(
        corpora,
        phase("pretrain", 50, first, mixture={"proportional": True, "over": list(HIGH)}),
        phase("joint", 30, second),
        seed=seed,
        **changes,
    )
    run_well("train", write_run_file(tmp_path, settings))
    assert events(tmp_path / "run") == []
    curve = [*losses(tmp_path / "run").values()]
    assert fmean(curve[40:50]) < fmean(curve[:10])
