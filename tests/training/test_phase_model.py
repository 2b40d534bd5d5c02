"""A phase with a sequence length and rotary positions of its own: what it trains with, measures and
records."""

import json
import re

import pytest
from distributed import check, launch
from plain_gpt import PlainGPT, PlainShape
from plan_support import read_held_out
from rounding import FP32, approx_validation
from run_support import (
    HELD_OUT,
    STEPS,
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    without_gap,
    write_run_file,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm_commands import run, run_killed, run_well

from megaphase.checkpoint.parameters import WEIGHT
from megaphase.convert.source import open_source
from megaphase.plan.dataset import read_step
from megaphase.plan.load_plan import open_run, preview_plan

SWITCH, END = STEPS[0], sum(STEPS)
BASE = 500.0
MODEL = {"seq_len": 128, "rotary_base": BASE}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def settings_of(corpora, model=MODEL, **changes):
    settings = run_settings(corpora, **changes)
    settings["phases"][1]["model"] = model
    return settings


@pytest.fixture(scope="module")
def single(corpora, tmp_path_factory):
    """Return the folder of a finished run of one process."""
    folder = tmp_path_factory.mktemp("single")
    run_well("train", write_run_file(folder, settings_of(corpora)))
    return folder


def plain_losses(source, base, batch):
    """Return nats per token, [batch, seq], of a checkpoint's weights in plain torch."""
    names = source.weights.layouts
    weights = {name: source.weights.whole(name, WEIGHT) for name in names}
    plain = PlainGPT(weights, PlainShape(layers=2, heads=4, kv_heads=2, rotary_base=base))
    return plain.losses(batch.inputs, batch.targets).detach()


def validation(rows, step, phase):
    [row] = [row for row in rows if "validation" in row and row["step"] == step
             and row["phase"] == phase]  # fmt: skip
    return row["validation"]


def test_the_first_losses_of_a_phase_are_those_of_its_rotary_positions(single):
    config, tokenizer = open_run(single / "run.yaml", None)
    plan = preview_plan(config, tokenizer)
    source = open_source(f"{single / 'run'}@pretrain")
    batch = read_step(plan, 1, 0, 0, 1, tokenizer.eod, None)
    losses = plain_losses(source, BASE, batch)
    scored = batch.targets >= 0
    rows = read_rows(single / "run")
    [first] = [row for row in rows if row["step"] == SWITCH + 1 and "loss" in row]
    assert first["loss"] == pytest.approx(float(losses.sum() / scored.sum()), rel=FP32)
    # Both ends of the switch are measured, each with its own positions.
    for number, (phase, base) in enumerate([("pretrain", 10_000.0), ("joint", BASE)]):
        seq_len = plan.spec.phases[number].kind.seq_len
        for task_number, (task, stream) in enumerate(plan.spec.held_out.items()):
            batch = read_held_out(stream.at(seq_len), task_number, HELD_OUT, tokenizer.eod)
            losses = plain_losses(source, base, batch)
            expected = float(losses.sum() / (batch.targets >= 0).sum())
            measured = validation(rows, SWITCH, phase)[task]["loss"]
            assert measured == pytest.approx(expected, rel=FP32)


def test_tensorboard_shows_the_losses_with_either_length_at_the_switch(corpora, tmp_path):
    settings = settings_of(corpora, logging={"tensorboard": True})
    settings["phases"].append(settings["phases"][1] | {"name": "more", "steps": 2})
    run_file = write_run_file(tmp_path, settings)
    run_killed(run_file, before_step=SWITCH + 1)  # resumes at the switch
    run_well("train", run_file)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    rows = [row for row in read_rows(tmp_path / "run") if "validation" in row]
    losses = [(row["step"], row["validation"]["cimri"]["loss"]) for row in rows]
    assert losses.count(losses[-2]) == 2  # both ends of the switch that changes no length
    shown = [(event.step, event.value) for event in board.Scalars("validation_loss/cimri")]
    expected = [each for number, each in enumerate(losses) if each not in losses[:number]]
    assert shown == [(step, pytest.approx(loss)) for step, loss in expected]
    assert [step for step, _ in shown].count(SWITCH) == 2


def test_checkpoints_record_the_model_of_the_phase_that_ended_or_was_trained(single):
    for name, base in (("pretrain", 10_000.0), ("joint", BASE)):
        shape = open_source(f"{single / 'run'}@{name}").shape
        assert (shape.rotary_base, shape.seq_len) == (base, 32 if name == "pretrain" else 128)
    out = single / "hf"
    run_well("convert", "to-hf", f"{single / 'run'}@joint", "--out", out)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == BASE
    assert config["max_position_embeddings"] == 128


@pytest.mark.parametrize("phase", ["pretrain", "joint"])
def test_evaluate_measures_a_checkpoint_with_the_model_of_its_phase(single, phase):
    step = {"pretrain": SWITCH, "joint": END}[phase]
    found = run_well("evaluate", single / "run.yaml", "--checkpoint", phase, "--json")
    expected = validation(read_rows(single / "run"), step, phase)
    figures = {task: without_gap(each) for task, each in expected.items()}
    assert json.loads(found) == {"step": step, "validation": figures}


def test_killed_in_either_phase_it_resumes_bit_for_bit(single, corpora, tmp_path):
    run_file = write_run_file(tmp_path, settings_of(corpora))
    for step in (SWITCH - 1, SWITCH + 1, END - 2):
        run_killed(run_file, before_step=step)
    run_well("train", run_file)
    assert timeless(read_rows(tmp_path / "run")) == timeless(read_rows(single / "run"))


@pytest.mark.slow
def test_layouts_are_equal_across_the_switch(single, corpora, tmp_path):
    parallel = {"tensor": 2, "zero": 3, "sequence": True}
    run_file = write_run_file(tmp_path, settings_of(corpora, parallel=parallel))
    check(launch(megaphase("train", run_file), 4))
    one, four = (timeless(read_rows(folder / "run")) for folder in (single, tmp_path))
    assert len(one) == len(four)
    for a, b in zip(one, four, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=FP32)
        elif "validation" in a:
            for task, figures in a["validation"].items():
                assert figures == approx_validation(b["validation"][task], FP32)
        else:
            assert a == b


def test_a_branch_may_change_what_its_first_phase_gives(single, corpora, tmp_path):
    settings = settings_of(corpora)
    settings["phases"] = settings["phases"][1:]
    run_file = write_run_file(tmp_path, settings)
    run_well("train", run_file, "--from", f"{single / 'run'}@pretrain")
    branched, whole = (
        [row for row in timeless(read_rows(folder / "run")) if row.get("phase") == "joint"
         and row.get("event") not in ("branch", "checkpoint", "best")]
        for folder in (tmp_path, single)
    )  # fmt: skip
    assert branched == whole


def test_a_branch_that_would_change_the_model_silently_is_refused(single, corpora, tmp_path):
    settings = settings_of(corpora, model=None)
    settings["phases"] = [settings["phases"][1] | {"name": "more"}]
    run_file = write_run_file(tmp_path, settings)
    refused = run("train", run_file, "--from", f"{single / 'run'}@joint")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"megaphase: {run_file}: model.seq_len: is 32, but "
        f"{single / 'run' / 'checkpoints' / 'step-00000021'} has 128; write the same model, or "
        "phases[0].model.seq_len where the first phase changes it\n"
    )


def test_rows_name_the_keys_that_the_phase_gives_and_count_its_tokens(single):
    starts = [row for row in read_rows(single / "run") if row.get("event") == "phase_start"]
    assert [row.get("model") for row in starts] == [None, MODEL]
    tokens = [row["tokens"] for row in read_rows(single / "run") if "loss" in row]
    longer = [8 * 32 * SWITCH + 8 * 128 * step for step in range(1, STEPS[1] + 1)]
    assert tokens == [8 * 32 * step for step in range(1, SWITCH + 1)] + longer


def test_plan_and_report_tell_each_phase_s_length(single):
    said = run_well("plan", single / "run.yaml", "--memory", 40)
    assert "joint (seq_len 128)" in said
    assert re.search(r"^Memory per GPU \(tensor 1 × data 1, ZeRO 0, phase joint\): ", said, re.M)
    run_well("report", single / "run", "--out", single / "report")
    assert "joint (seq_len 128)" in (single / "report" / "index.html").read_text()


def test_a_phase_may_use_fewer_of_the_learned_positions(corpora, tmp_path):
    settings = run_settings(corpora)
    settings["model"] |= {
        "position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True,
        "kv_heads": 4,
    }  # fmt: skip
    settings["phases"][0] |= {"model": {"seq_len": 16}, "steps": 3}
    settings["phases"][1]["steps"] = 3
    run_well("train", write_run_file(tmp_path, settings))
    shape = open_source(f"{tmp_path / 'run'}@pretrain").shape
    assert (shape.seq_len, shape.position_rows) == (16, 32)
    run_well("convert", "to-hf", f"{tmp_path / 'run'}@pretrain", "--out", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["n_positions"] == 32
    args = ("--out", tmp_path / "megatron", "--tensor", 2)
    run_well("convert", "to-megatron", f"{tmp_path / 'run'}@pretrain", *args)
