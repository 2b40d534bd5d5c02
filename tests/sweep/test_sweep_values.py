"""Numbers and names of a sweep file in its runs: nothing is rounded away, and nothing is confused
with something else."""

from __future__ import annotations

import pytest
from sweep_support import sweep_of

from megaphase.checkpoint.names import find_checkpoint
from megaphase.sweep.trials import all_trials
from megaphase.utils.errors import InputError


def trials(tmp_path, arms, steps=60, **more):
    more = {"learning_rate": {"peaks": [0.001]}} | more
    sweep = sweep_of(tmp_path / "sweep", arms, **more)
    return all_trials(sweep.model_copy(update={"steps": steps}))


def test_values_that_differ_in_the_seventh_digit_are_runs_of_their_own(tmp_path):
    arms = {"static": {"rates": [0.1, 0.10000001]}}
    found = trials(tmp_path, arms, learning_rate={"peaks": [0.001, 0.0010000001]})
    assert [trial.name for trial in found] == [
        "static-r0.1-p0.001-s1234",
        "static-r0.1-p0.0010000001-s1234",
        "static-r0.10000001-p0.001-s1234",
        "static-r0.10000001-p0.0010000001-s1234",
    ]


@pytest.mark.parametrize(
    ("share", "steps", "first"),
    [(0.285, 1000, 285), (0.575, 100, 58), (0.145, 100, 14), (0.7, 10, 7), (0.999, 10, 9)],
)
def test_a_share_of_the_budget_is_the_decimal_number_that_was_written(
    tmp_path, share, steps, first
):
    """Of halves, the even one."""
    found = trials(tmp_path, {"two-phase": {"rates": [0.1], "pretrain": [share]}}, steps=steps)
    assert [trial.run["phases"][0]["steps"] for trial in found] == [first, steps - first]


def test_a_warm_up_is_the_decimal_number_that_was_written(tmp_path):
    grid = {"peaks": [0.001], "warmup": 0.575}
    (trial,) = trials(tmp_path, {"static": {"rates": [0.1]}}, learning_rate=grid, steps=100)
    assert trial.run["phases"][0]["learning_rate"]["warmup_steps"] == 58


def test_a_list_that_is_one_value_of_the_run_file_is_one_in_a_phase_too(tmp_path):
    phases = [{"rate": 0.1, "settings": {"optimizer.betas": [0.9, 0.99]}}]
    (trial,) = trials(tmp_path, {"a": {"phases": phases}})
    assert trial.run["optimizer"] == {"betas": [0.9, 0.99]}
    phases[0]["settings"] = {"optimizer.betas": {"try": [[0.9, 0.95], [0.9, 0.99]]}}
    first, _ = trials(tmp_path, {"a": {"phases": phases}})
    assert first.setting.get("phases[0].settings.optimizer.betas") == "[0.9, 0.95]"


def test_a_task_whose_rate_would_be_rounded_to_nothing(tmp_path):
    with pytest.raises(InputError, match=r"languages.yaml: arms: with 1e-06% .* rate below 1e-06"):
        trials(tmp_path, {"static": {"rates": [1e-8]}})
    with pytest.raises(InputError, match=r"arms: with 10% for .* tasks hi has a rate"):
        trials(tmp_path, {"static": {"rates": [0.1]}}, within={"low": 0.01})


def test_two_runs_of_one_name(tmp_path):
    arms = {"b-static": {"kind": "static", "rates": [0.1]}, "static": {"rates": [0.1]}}
    models = {"a": {"layers": 1}, "a-b": {"layers": 2}}
    with pytest.raises(InputError, match=r"two different runs would be called a-b-static-"):
        trials(tmp_path, arms, models=models)


def test_a_name_that_is_too_long_for_a_file(tmp_path):
    arms = {"x" * 100: {"kind": "static", "rates": [0.1]}}
    with pytest.raises(InputError, match="which is too long for a file"):
        trials(tmp_path, arms, models={"y" * 100: {}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("~nosuchuser/run@end", "no home folder of '~nosuchuser' is known"),
        ("x" * 300 + "@end", "is too long"),
        ("a\nb@end", "contains a control character"),
    ],
)
def test_a_checkpoint_at_a_path_that_no_file_has(text, said):
    with pytest.raises(InputError, match=said):
        find_checkpoint(text)


def test_a_checkpoint_below_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    step = tmp_path / "run" / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    assert find_checkpoint("~/run@step-00000004") == step.resolve()
