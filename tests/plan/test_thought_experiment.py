"""`megaphase plan` before there is any text: `tokens` in place of corpora."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from megaphase.config.load import load_run_file
from megaphase.plan.commands import plan_app
from megaphase.plan.spec import verified_corpora
from megaphase.utils.errors import InputError

RATE = {"peak": 1e-3}
RUN = {
    "output": "run",
    "tokenizer": "tok",
    "tasks": {"en": {"tokens": 1_000_000}, "hi": {"tokens": 10_000, "held_out": 0.2}},
    "model": {"layers": 2, "hidden": 64, "heads": 2, "seq_len": 100, "vocab": 500},
    "batch": {"samples": 10, "micro": 5},
    "validation": {"fraction": 0.1},
    "phases": [
        {
            "name": "first",
            "tokens": 450_000,
            "mixture": {"rates": {"en": 1}},
            "learning_rate": RATE,
        },
        {
            "name": "joint",
            "steps": 100,
            "mixture": {"rates": {"en": 0.5, "hi": 0.5}, "max_epochs": 4},
            "learning_rate": RATE,
        },
    ],
}


@pytest.fixture
def planned(tmp_path):
    """Run the command for the run file with some keys replaced; return the result."""

    def run(*options, **changes):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN | changes))
        return CliRunner().invoke(plan_app, [str(tmp_path / "run.yaml"), *options])

    return run


def test_tokens_rates_and_epochs_are_those_of_the_numbers(planned, tmp_path):
    summary = json.loads(planned("--json").stdout)
    first, joint = summary["phases"]
    assert (first["steps"], joint["tokens"]) == (450, 100_000)
    assert first["tasks"]["en"]["epochs"] == pytest.approx(450_000 / 900_000)
    # Four epochs of 8,000 tokens are 320 samples; by its rate the task would have 500.
    assert joint["tasks"]["hi"]["samples"] == 320
    assert joint["tasks"]["hi"]["epochs_so_far"] == pytest.approx(4)
    assert joint["tasks"]["en"]["rate"] == pytest.approx(0.68)
    assert joint["tasks"]["en"]["epochs_so_far"] == pytest.approx((450_000 + 68_000) / 900_000)
    assert summary["memory"]["layouts"][0]["bytes"] > 0
    assert summary["speed"]["seconds"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_the_output_says_that_nothing_was_read(planned):
    said = planned().stdout
    assert "Planned from numbers of tokens: no corpus was read, and no index built\n" in said
    assert "Index: " not in said
    assert "To be expected: " in said


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (
            [],
            {"tasks": {"en": {"tokens": 100}, "hi": {"corpus": "hi"}}},
            "give tokens for all tasks",
        ),
        ([], {"tasks": {"en": {}}}, "corpus is missing; add it, or tokens to plan before there is"),
        ([], {"tasks": {"en": {"tokens": 5, "corpus": "en"}}}, "give either corpus or tokens"),
        (
            [],
            {"model": RUN["model"] | {"vocab": None}},
            "tok does not exist yet; write model.vocab",
        ),
        (["--plot", "x.png"], {}, "--plot: needs corpora, and the tasks have tokens; leave it out"),
        (["--from", "x@y"], {}, "--from: needs corpora, and the tasks have tokens; leave it out"),
    ],
)
def test_what_is_refused(planned, options, changes, message):
    error = planned(*options, **changes).exception
    assert isinstance(error, InputError)
    assert message in str(error)


def test_training_refuses_it(planned, tmp_path):
    planned()
    with pytest.raises(InputError) as error:
        verified_corpora(load_run_file(tmp_path / "run.yaml"))
    assert str(error.value) == (
        f"{tmp_path / 'run.yaml'}: tasks.en.tokens: is for `megaphase plan` alone; nothing else "
        "works without text; tokenize the text, and name its corpus instead"
    )


def test_a_ramp_that_the_processes_cannot_share_is_refused(planned):
    ramp = {"from": 2, "step": 2, "tokens": 10_000}
    # 90 samples of en are 23 steps of 4; their 9,200 tokens are 2.76 of the ramp's three parts.
    first = RUN["phases"][0] | {"tokens": None, "epochs": {"en": 0.01}, "batch": {"samples": 4}}
    result = planned(
        batch={"samples": 8, "micro": 4, "ramp": ramp}, phases=[first, RUN["phases"][1]]
    )
    assert "batch.ramp: 6 samples, the batch of joint from its step 1 on" in str(result.exception)
