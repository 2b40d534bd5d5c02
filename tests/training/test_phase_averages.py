"""Runs whose phases have averages: exact, whatever happens to them, and beside the training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import whole_parameters
from distributed import launch
from run_support import (
    STEPS,
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    without_gap,
    write_run_file,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm_commands import run, run_killed, run_well

TOLERANCE = 1e-6
UNIFORM = {"kind": "uniform", "every_steps": 2, "from_step": 3}
EMA = {"kind": "ema", "decay": 0.5, "device": "cpu"}
SWITCH, END = STEPS[0], sum(STEPS)
Runner = Callable[..., Path]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def settings_of(corpora: Path, *, averages: bool = True, **changes: Any) -> dict[str, Any]:
    settings = run_settings(corpora, **changes)
    if averages:
        settings["phases"][0] |= {"average": UNIFORM}
        settings["phases"][1] |= {"average": EMA, "begin_from": "average"}
    return settings


@pytest.fixture(scope="module")
def whole(corpora: Path, folder: Path) -> Path:
    """Return the run that was never interrupted, with a checkpoint of every step."""
    settings = settings_of(corpora, checkpoint={"every_steps": 1, "keep": 100})
    run_well("train", write_run_file(folder / "whole", settings))
    return folder / "whole" / "run"


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def rows_of(run_dir: Path, phase: str, *, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Rows of a phase that do not depend on how often the run saves."""
    return [
        {key: value for key, value in row.items() if key not in without}
        for row in timeless(read_rows(run_dir))
        if row.get("phase") == phase and row.get("event") != "checkpoint"
    ]


def test_averages_are_those_of_the_saved_weights_of_each_step(whole: Path) -> None:
    weights = {step: whole_parameters(checkpoint(whole, step)) for step in range(1, END + 1)}
    for step in range(1, END + 1):
        index = json.loads((checkpoint(whole, step) / "parameters.json").read_text())
        state = json.loads((checkpoint(whole, step) / "state.json").read_text())
        if step < 3:
            assert "average" not in index["kinds"]
            assert "average" not in state
            continue
        found = whole_parameters(checkpoint(whole, step), "average")
        first, taken = (SWITCH + 1, step - SWITCH) if step > SWITCH else (3, (step - 1) // 2)
        assert state["average"]["taken"] == taken
        for name, average in found.items():
            if step <= SWITCH:
                taken_weights = [weights[n][name].double() for n in range(first, step + 1, 2)]
                wanted = torch.stack(taken_weights).mean(0)
            else:
                wanted = weights[first][name].double()
                for n in range(first + 1, step + 1):
                    wanted = 0.5 * wanted + 0.5 * weights[n][name].double()
            torch.testing.assert_close(average.double(), wanted, rtol=0, atol=TOLERANCE)


def test_validations_show_both_and_the_next_phase_begins_from_the_average(whole: Path) -> None:
    rows = [row for row in read_rows(whole) if "validation" in row]
    at = {(row["step"], row["phase"]): row for row in rows}
    assert [("validation_average" in at[step, "pretrain"]) for step in (0, 5, 10, SWITCH)] == [
        False, True, True, True,
    ]  # fmt: skip
    end, start = at[SWITCH, "pretrain"], at[SWITCH, "joint"]
    assert "validation_average" not in start
    begun = {task: without_gap(figures) for task, figures in start["validation"].items()}
    assert begun == end["validation_average"]
    assert begun != {task: without_gap(each) for task, each in end["validation"].items()}
    assert "validation_average" in at[END, "joint"]
    event = next(row for row in read_rows(whole) if row.get("event") == "begin_from_average")
    assert event == {"step": SWITCH, "event": "begin_from_average", "phase": "joint", "taken": 5}


def test_an_average_changes_nothing_of_its_phase(whole: Path, corpora: Path, folder: Path) -> None:
    settings = settings_of(corpora, averages=False)
    settings["phases"] = settings["phases"][:1]
    run_well("train", write_run_file(folder / "plain", settings))
    extra = ("validation_average", "begins_phase")
    assert rows_of(folder / "plain" / "run", "pretrain") == rows_of(
        whole, "pretrain", without=extra
    )


def test_killed_runs_resume_bit_for_bit(whole: Path, corpora: Path, folder: Path) -> None:
    run_file = write_run_file(folder / "killed", settings_of(corpora))
    for before in (3, 8, SWITCH + 2, END - 1):  # step 14 begins the phase again
        run_killed(run_file, "checkpoint.asynchronous=false", before_step=before)
    run_well("train", run_file, "phases.1.average.device=weights")  # the device may change
    killed = folder / "killed" / "run"
    for phase in ("pretrain", "joint"):
        assert rows_of(killed, phase) == rows_of(whole, phase)
    for step in (SWITCH, END):
        for kind in ("weight", "average"):
            assert_same(checkpoint(killed, step), checkpoint(whole, step), kind)


def assert_same(one: Path, other: Path, kind: str) -> None:
    left, right = whole_parameters(one, kind), whole_parameters(other, kind)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_branches_take_weights_or_average(whole: Path, corpora: Path, folder: Path) -> None:
    settings = settings_of(corpora)
    settings["phases"] = settings["phases"][1:]
    run_file = write_run_file(folder / "branch", settings)
    run_killed(run_file, "--from", f"{whole}@pretrain", before_step=SWITCH + 2)
    run_well("train", run_file)
    branch = folder / "branch" / "run"
    assert rows_of(branch, "joint", without=("best",))[1:] == [
        row for row in rows_of(whole, "joint")[1:] if row.get("event") != "branch"
    ]
    assert_same(checkpoint(branch, END), checkpoint(whole, END), "average")

    plain = settings | {"phases": [settings["phases"][0] | {"begin_from": "weights", "steps": 3}]}
    run_file = write_run_file(folder / "plain-branch", plain)
    run_well("train", run_file, "--from", f"{whole}@pretrain")
    rows = rows_of(folder / "plain-branch" / "run", "joint")
    at_switch = next(row for row in rows if "validation" in row)
    end = next(
        row for row in rows_of(whole, "pretrain") if "validation" in row and row["step"] == SWITCH
    )
    assert {t: without_gap(each) for t, each in at_switch["validation"].items()} == {
        t: without_gap(each) for t, each in end["validation"].items()
    }


def test_other_commands_take_the_average(whole: Path, tmp_path: Path) -> None:
    run_file = whole.parent / "run.yaml"
    figures = json.loads(
        run_well("evaluate", run_file, "--checkpoint", "pretrain", "--average", "--json")
    )
    row = next(r for r in read_rows(whole) if "validation" in r and r["step"] == SWITCH)
    assert figures["validation"] == row["validation_average"]
    average = whole_parameters(checkpoint(whole, SWITCH), "average")
    run_well(
        "convert", "to-hf", f"{whole}@pretrain", "--average", "--out", tmp_path / "hf",
        "--no-tokenizer",
    )  # fmt: skip
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(exported["model.embed_tokens.weight"], average["embedding.weight"])
    for layout in (["--portable"], ["--tensor", "2", "--data", "2"]):
        out = tmp_path / f"reshaped{len(layout)}"
        run_well("convert", "reshape", f"{whole}@pretrain", *layout, "--out", out)
        assert_same(out, checkpoint(whole, SWITCH), "average")
    run_well(
        "convert", "reshape", f"{whole}@pretrain", "--portable", "--average", "--out",
        tmp_path / "alone",
    )  # fmt: skip
    for name, tensor in whole_parameters(tmp_path / "alone").items():
        assert torch.equal(tensor, average[name])
    facts = json.loads(run_well("convert", "inspect", f"{whole}@pretrain", "--json"))
    assert facts["average"] == UNIFORM | {"taken": 5}
    result = run("generate", f"{whole}@step-00000002", "--average", "--prompt", "a")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "holds no average of the weights" in result.stderr


@pytest.mark.distributed
def test_a_run_resumes_on_another_layout(whole: Path, corpora: Path, folder: Path) -> None:
    run_file = write_run_file(folder / "elastic", settings_of(corpora))
    run_killed(run_file, "checkpoint.asynchronous=false", before_step=10)
    parallel = {"tensor": 1, "zero": 3}
    write_run_file(folder / "elastic", settings_of(corpora, parallel=parallel))
    for result in launch(megaphase("train", run_file), 2):
        assert result.returncode == 0, result.stderr
    for step in (SWITCH, END):
        found = whole_parameters(checkpoint(folder / "elastic" / "run", step), "average")
        for name, wanted in whole_parameters(checkpoint(whole, step), "average").items():
            torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-4)


def test_a_phase_that_ends_before_its_average_begins(corpora: Path, folder: Path) -> None:
    settings = settings_of(corpora)
    settings["phases"][0] |= {
        "average": UNIFORM | {"from_step": 12},
        "stop": {"loss": {"alda": 100.0}},
    }
    run_file = write_run_file(folder / "early", settings)
    for _ in range(2):  # also where it is resumed
        result = run("train", run_file)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert "joint step 5: begin_from is average, but pretrain ended before" in result.stderr
    assert checkpoint(folder / "early" / "run", 5).is_dir()


def noisy(settings: dict[str, Any]) -> dict[str, Any]:
    """A run whose average is better than its weights, and whose second phase makes them worse."""
    for phase, peak in zip(settings["phases"], (0.1, 0.5), strict=True):
        phase["learning_rate"] = {"schedule": "constant", "peak": peak}
    settings["phases"][1]["steps"] = 2
    settings["faults"] = {"stop_on_divergence": False}
    settings["logging"]["tensorboard"] = True
    settings["monitor"] = {"tasks": ["alda", "boreth"]}
    return settings


@pytest.mark.parametrize("ends", ["at its length", "early"])
def test_the_average_may_be_the_best_and_is_shown(corpora: Path, folder: Path, ends: str) -> None:
    settings = noisy(settings_of(corpora))
    if ends == "early":  # after a validation that no checkpoint follows otherwise
        settings["phases"][0]["stop"] = {"loss": {"alda": 100.0}}
        settings["checkpoint"]["every_steps"] = 3
    switch = 5 if ends == "early" else SWITCH
    run_file = write_run_file(folder / f"noisy {ends}", settings)
    run_killed(run_file, before_step=switch + 1)  # resumes at the switch
    run_well("train", run_file)
    run_dir = run_file.parent / "run"
    rows = [row for row in read_rows(run_dir) if "validation" in row]
    [before, after] = [row for row in rows if row["step"] == switch]
    average = whole_parameters(checkpoint(run_dir, switch), "average")
    weights = whole_parameters(checkpoint(run_dir, switch))
    from_average = []
    # Where the phase ends early, the weights before are the best of one task, the average that of
    # the other.
    for task in ("alda", "boreth") if ends == "early" else ("alda",):
        lowest = min(rows, key=lambda row: row["validation"][task]["loss"])
        assert lowest in (before, after)
        expected = average if lowest is after else weights
        from_average.append(lowest is after)
        found = whole_parameters(run_dir / "checkpoints" / f"best-{task}")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert from_average == ([True, False] if ends == "early" else [True])
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    shown = [(event.step, event.value) for event in board.Scalars("validation_loss/alda")]
    losses = [(row["step"], row["validation"]["alda"]["loss"]) for row in rows]
    assert shown == [(step, pytest.approx(loss)) for step, loss in losses]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["phases"][0].pop("average"), "phases[1].begin_from: is average, but pretrain"),
        (lambda s: s["phases"][0].update(begin_from="average"), "starts from no checkpoint"),
        (lambda s: s["phases"][0]["average"].update(from_step=13), "but the phase has 12 steps"),
        (
            lambda s: s["phases"][0]["average"].update(every_steps=13),
            "average.every_steps: is 13, but the phase has 12 steps",
        ),
        (lambda s: s["phases"][0]["average"].update(decay=0.5), "decay is only for kind: ema"),
        (lambda s: s["phases"][1]["average"].pop("decay"), "kind: ema needs decay"),
        (
            lambda s: s["parallel"].update(zero=3, offload="nvme", offload_folder="/tmp"),
            "does not go with parallel.offload: nvme",
        ),
    ],
)
def test_refusals(
    change: Callable[[dict[str, Any]], object], said: str, corpora: Path, tmp_path: Path
) -> None:
    settings = json.loads(json.dumps(settings_of(corpora)))
    change(settings)
    result = run("train", write_run_file(tmp_path, settings))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert said in result.stderr
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_a_checkpoint_without_an_average_is_no_start_from_one(
    whole: Path, corpora: Path, tmp_path: Path
) -> None:
    settings = settings_of(corpora)
    settings["phases"] = settings["phases"][1:]
    run_file = write_run_file(tmp_path, settings)
    result = run("train", run_file, "--from", f"{whole}@step-00000002")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "holds no average of the weights" in result.stderr
