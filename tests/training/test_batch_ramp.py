"""A batch that grows: a plain loop's numbers on every layout, exact resume, and refusals."""

from __future__ import annotations

import json
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RunningRanks, check, launch, once, run_ranks
from engine_support import fp32_weights
from plain_gpt import PlainAdamW, PlainGPT, PlainShape
from run_support import make_corpora, megaphase, read_rows, run_settings, timeless, write_run_file
from torch import Tensor
from warm_commands import kill_before, run, run_killed, run_well

from megaphase.config.load import load_run_file
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.process_grid import start_process_grid
from megaphase.model.presets import build_shape
from megaphase.optim.schedules import learning_rate
from megaphase.plan.dataset import read_step
from megaphase.plan.load_plan import preview_plan
from megaphase.tokenizer import Tokenizer
from megaphase.training.engine import Engine

SEQ_LEN = 32
STEPS = 12
# 1,100 tokens in two parts: 128 of the first batch are below 550 for 5 steps, which are 640, and
# 192 of the second one then below 1,100 for 3 steps.
BATCHES = [4] * 5 + [6] * 3 + [8] * 4
OWN = 4  # of the second phase
KILLED_BEFORE = 7


def settings_of(corpora: Path, **parallel: int) -> dict[str, Any]:
    settings = run_settings(corpora)
    settings["parallel"] = {"tensor": 1, "zero": 0, **parallel}
    ramp = {"from": 4, "step": 2, "tokens": 1100}
    settings["checkpoint"]["asynchronous"] = False
    settings["batch"] = {"samples": 8, "micro": 1, "ramp": ramp}
    first, second = settings["phases"]
    first["learning_rate"]["scale_with_batch"] = "sqrt"
    second |= {"steps": 3, "batch": {"tokens": OWN * SEQ_LEN, "micro": 2}}
    return settings


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def alone(corpora, tmp_path_factory):
    """The run file of a run on one process that was never interrupted."""
    run_file = write_run_file(tmp_path_factory.mktemp("alone"), settings_of(corpora))
    run_well("train", run_file)
    return run_file


def steps_of(run_file: Path) -> list[dict[str, Any]]:
    rows = timeless(read_rows(run_file.parent / "run"))
    return [row for row in rows if "loss_by_task" in row]


def first_weights(run_file: Path) -> dict[str, Tensor]:
    """Run on a rank: the weights with which the run starts."""
    config = load_run_file(run_file, ())
    shape = build_shape(config, Tokenizer.load(config.tokenizer).vocab_size)
    with process_group():
        return fp32_weights(Engine(config, shape, start_process_grid(1), len(config.tasks)))


def test_a_ramp_trains_as_a_plain_loop(alone):
    config = load_run_file(alone, ())
    plan = preview_plan(config, Tokenizer.load(config.tokenizer))
    rows = steps_of(alone)
    assert [row["samples"] for row in rows] == BATCHES + [OWN] * 3
    sums = [SEQ_LEN * sum((BATCHES + [OWN] * 3)[: n + 1]) for n in range(len(rows))]
    assert [row["tokens"] for row in rows] == sums

    model = PlainGPT(run_ranks(first_weights, 1, alone)[0], PlainShape(2, 4, 2))
    optimizer = PlainAdamW(model.weights)
    schedule = config.phases[0].learning_rate
    for step, (samples, row) in enumerate(zip(BATCHES, rows, strict=False)):
        batch = read_step(plan, 0, step, 0, 1, 0)
        assert len(batch) == samples
        loss = model.losses(batch.inputs, batch.targets).sum() / batch.scored_tokens.sum()
        gradients = torch.autograd.grad(loss, list(model.weights.values()))
        rate = learning_rate(schedule, step, STEPS) * math.sqrt(samples / 8)
        norm = optimizer.step(dict(zip(model.weights, gradients, strict=True)), rate)
        assert row["learning_rate"] == pytest.approx(rate, rel=1e-12)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_run_killed_in_its_ramp_resumes_bit_for_bit(alone, corpora, tmp_path):
    run_file = write_run_file(tmp_path, settings_of(corpora))
    run_killed(run_file, before_step=KILLED_BEFORE)
    assert "resuming from" in run_well("train", run_file)
    rows = [timeless(read_rows(path.parent / "run")) for path in (alone, run_file)]
    assert rows[0] == rows[1]


@once
def two_by_two(run_file: Path) -> list[dict[str, Any]]:
    """The rows of a run on 2 × 2 processes that is killed in its ramp."""
    command = megaphase("train", run_file)
    with RunningRanks(command, 4, prepare=partial(kill_before, KILLED_BEFORE)) as ranks:
        ranks.processes[0].wait(300)
        assert ranks.result(0).returncode == -signal.SIGKILL
        ranks.signal(signal.SIGKILL)
    check(launch(command, 4))
    return steps_of(run_file)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_by_two_ranks_have_the_numbers_of_one(alone, corpora, tmp_path):
    settings = settings_of(corpora, tensor=2, zero=3)
    for row, other in zip(
        steps_of(alone), two_by_two(write_run_file(tmp_path, settings)), strict=True
    ):
        assert [row[key] for key in ("step", "samples", "tokens", "learning_rate")] == [
            other[key] for key in ("step", "samples", "tokens", "learning_rate")
        ]
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)


def test_the_plan_shows_the_stages_and_traces_their_steps(alone):
    shown = " ".join(run_well("plan", alone).split())
    assert (
        "Batch of pretrain: 4 samples (128 tokens), "
        "6 samples (192 tokens) from step 6 of the phase on, "
        "8 samples (256 tokens) from step 9 of the phase on Batch of joint: 4 samples (128 tokens)"
    ) in shown
    figures = json.loads(run_well("plan", alone, "--json"))
    assert [stage["steps"] for stage in figures["phases"][0]["batch"]] == [5, 3, 4]
    assert [phase["samples"] for phase in figures["phases"]] == [sum(BATCHES), 3 * OWN]
    assert "samples_per_step" not in figures
    traced = run_well("plan", "trace", alone.parent / "run", "--step", 7, "--json")
    assert len(traced.splitlines()) == 6


def test_lengths_in_tokens_and_epochs_count_the_ramp(alone):
    def figures(*changes: str) -> dict[str, Any]:
        changes = ("output=other", "phases.0.steps=null", *changes)
        return json.loads(run_well("plan", alone, "--json", *changes))["phases"][0]

    tokens = SEQ_LEN * sum(BATCHES)
    assert figures(f"phases.0.tokens={tokens}")["steps"] == STEPS
    assert figures(f"phases.0.tokens={tokens + 1}")["steps"] == STEPS + 1
    phase = figures("phases.0.epochs={alda: 0.1}")
    assert 0.1 <= phase["tasks"]["alda"]["epochs"] < 0.1 + 8 / phase["samples"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 9}, "batch.ramp.step: 2 does not divide the 5 samples from the first batch"),
        (
            {"micro": 4, "samples": 8},
            "batch.ramp: 6 samples, the batch of pretrain from its step 6",
        ),
        ({"micro": 16, "samples": 16}, "batch.ramp: 4 samples, the batch of pretrain from its"),
        ({"tokens": 100, "samples": None}, "batch.tokens: 100 is not a multiple of seq_len 32 in"),
        ({"tokens": 256}, "batch.samples: tokens is given, too; leave one of them out"),
        ({"samples": 4}, "batch.ramp.from: 4 samples are not fewer than the full batch of 4"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_before_the_start(changes, said, corpora, tmp_path):
    settings = settings_of(corpora)
    settings["batch"] |= changes
    del settings["phases"][1]["batch"]
    result = run("train", write_run_file(tmp_path, settings))
    assert result.returncode == 2
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


def test_only_the_stages_that_are_left_have_to_be_divisible(alone, corpora, tmp_path):
    run_file = write_run_file(tmp_path, settings_of(corpora))
    run_killed(run_file, before_step=10)  # with a checkpoint after step 8
    larger = ["batch.micro=4"]
    assert "resuming from" in run_well("train", run_file, *larger)
    for row, other in zip(steps_of(alone), steps_of(run_file), strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
    again = write_run_file(tmp_path / "again", settings_of(corpora))
    run_killed(again, before_step=6)  # after step 4
    result = run("train", again, *larger)
    assert result.returncode == 2
    assert "batch.ramp: 6 samples, the batch of pretrain from its step 6 on," in result.stderr
