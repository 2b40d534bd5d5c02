"""`megaphase sweep`: which runs follow from a file, and what is wrong with it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_support import HIGH, LOW, make_corpora
from sweep_run_support import STEPS, invented, open_sweep, settings, write

from megaphase.config.load import load_run_file
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.file import SweepConfig
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.start import dry_run, refuse_failures
from megaphase.sweep.sweep import load_sweep
from megaphase.sweep.trials import Trial, all_trials, known_trials
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.yaml_file import read_yaml


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def phases(trial: Trial) -> list[tuple[str, int]]:
    return [(phase["name"], phase["steps"]) for phase in trial.run["phases"]]


def test_first_stages_are_tuned_and_shared(corpora: Path, tmp_path: Path) -> None:
    arms = {
        "static": {"rates": [0.1, 0.3], "temperatures": [5]},
        "two-phase": {"pretrain": [0.5, 0.8], "rates": [0.4]},
        "low-only": {"pretrain": [0.8]},
    }
    grid = {"peaks": [1e-3, 4e-3], "warmup": 0.1, "final": 0.1}
    content = settings(corpora, arms=arms, learning_rate=grid, seeds=[1, 2], steps=40)
    sweep = load_sweep(write(tmp_path, content))
    first = known_trials(sweep, {})
    assert [trial.is_final for trial in first] == [False] * 8 + [True] * 12
    assert {trial.name for trial in first[:4]} == {
        f"pretrain-0.5-p{peak}-s{seed}" for peak in ("0.001", "0.004") for seed in (1, 2)
    }
    assert phases(first[0]) == [("pretrain", 20)]
    rate = first[0].run["phases"][0]["learning_rate"]
    assert rate == {"schedule": "cosine", "peak": 1e-3, "final": 1e-4, "warmup_steps": 2}

    outcomes = {trial.name: invented(trial, best=4e-3) for trial in first[:7]}
    assert len(known_trials(sweep, outcomes)) == 20 + 4  # the shorter length is known
    outcomes |= {trial.name: invented(trial, best=4e-3) for trial in first}
    everything = known_trials(sweep, outcomes)
    assert len(everything) == len(all_trials(sweep)) == 20 + 12
    branches = {trial.name: trial for trial in everything if trial.source is not None}
    branch = branches["two-phase-0.8-r0.4-f0.004-p0.001-s2"]
    assert (branch.source, branch.source_phase) == ("pretrain-0.8-p0.004-s2", "pretrain")
    assert phases(branch) == [("joint", 8)]
    low_only = branches["low-only-0.8-p0.004-s1"]
    assert low_only.source == "pretrain-0.8-p0.004-s1"
    assert low_only.run["phases"][0]["mixture"] == {"rates": {LOW[0]: 1.0}}


def test_rates_within_a_group_follow_its_tokens(corpora: Path, tmp_path: Path) -> None:
    arms = {"static": {"rates": [0.2]}}
    for temperature in (1.0, 3.0):
        content = settings(corpora, arms=arms, within={"high": temperature})
        sweep = load_sweep(write(tmp_path, content))
        rates = all_trials(sweep)[0].run["phases"][0]["mixture"]["rates"]
        weights = [sweep.tokens[task] ** (1 / temperature) for task in HIGH]
        assert rates[HIGH[0]] / rates[HIGH[1]] == pytest.approx(weights[0] / weights[1], rel=1e-4)
        assert rates[LOW[0]] == pytest.approx(0.2)
        assert sum(rates.values()) == pytest.approx(1, abs=1e-9)


def test_failed_peaks_are_not_chosen(corpora: Path, tmp_path: Path) -> None:
    arms = {"two-phase": {"pretrain": [0.5], "rates": [0.4]}}
    content = settings(corpora, arms=arms, learning_rate={"peaks": [1e-3, 4e-3]}, seeds=[1, 2])
    sweep = load_sweep(write(tmp_path, content))
    first = known_trials(sweep, {})
    outcomes = {trial.name: invented(trial, best=4e-3) for trial in first}
    outcomes["pretrain-0.5-p0.004-s2"] = Outcome(failed="out of cheese")
    sources = {trial.source for trial in known_trials(sweep, outcomes) if trial.source}
    assert sources == {"pretrain-0.5-p0.001-s1", "pretrain-0.5-p0.001-s2"}
    outcomes |= {trial.name: Outcome(failed="out of cheese") for trial in first}
    assert known_trials(sweep, outcomes) == first


def test_peaks_that_diverged_are_not_chosen(corpora: Path, tmp_path: Path) -> None:
    arms = {"two-phase": {"pretrain": [0.5], "rates": [0.4]}}
    content = settings(corpora, arms=arms, learning_rate={"peaks": [1e-3, 4e-3]}, seeds=[1, 2])
    sweep, directory = open_sweep(write(tmp_path, content))
    first = known_trials(sweep, {})
    diverged = Outcome(diverged="at step 5", losses=dict.fromkeys([*HIGH, *LOW], math.nan))
    outcomes = {trial.name: invented(trial, best=4e-3) for trial in first}
    outcomes["pretrain-0.5-p0.004-s2"] = diverged
    sources = {trial.source for trial in known_trials(sweep, outcomes) if trial.source}
    assert sources == {"pretrain-0.5-p0.001-s1", "pretrain-0.5-p0.001-s2"}
    outcomes |= {trial.name: diverged for trial in first}
    assert known_trials(sweep, outcomes) == first
    with pytest.raises(RunError, match=r"4 runs could not start: .* diverged with every peak"):
        refuse_failures(sweep, directory, outcomes)


def test_restart_keeps_its_mixture_and_keep_its_schedule(corpora: Path, tmp_path: Path) -> None:
    arms = {
        "restart": {"pretrain": [0.6], "rates": [0.2]},
        "keep": {"pretrain": [0.6], "rates": [0.2]},
    }
    sweep = load_sweep(write(tmp_path, settings(corpora, arms=arms)))
    trials = {trial.name: trial for trial in all_trials(sweep)}
    first = trials["restart-first-0.6-r0.2-p0.01-s11"]
    again = trials["restart-0.6-r0.2-p0.01-s11"]
    assert phases(first) == [("static", 6)]
    assert phases(again) == [("restart", 4)]
    assert first.run["phases"][0]["mixture"] == again.run["phases"][0]["mixture"]
    assert "optimizer_state" not in again.run["phases"][0]  # reset is the default

    start, end = (trials[f"{name}-0.6{rest}-p0.01-s11"].run["phases"][0] for name, rest in
                  (("keep-pretrain", ""), ("keep", "-r0.2")))  # fmt: skip
    assert end["optimizer_state"] == "keep"
    assert start["learning_rate"] | {"first_step": 6} == end["learning_rate"]
    assert start["learning_rate"]["steps"] == STEPS


def test_tasks_of_neither_group_are_left_out(corpora: Path, tmp_path: Path) -> None:
    changes = {"high": [HIGH[0]], "settings": {f"tasks.{LOW[0]}.subsample": 0.5}}
    sweep = load_sweep(write(tmp_path, settings(corpora, **changes)))
    for trial in all_trials(sweep):
        assert list(trial.run["tasks"]) == [HIGH[0], *LOW]
        assert trial.run["tasks"][LOW[0]]["subsample"] == 0.5


def test_settings_models_and_early_stopping_reach_the_run_files(
    corpora: Path, tmp_path: Path
) -> None:
    regularized = {
        "kind": "regularized",
        "rates": [0.2],
        "settings": {"model.dropout": 0.1, "optimizer.weight_decay": 0.3},
        "early_stopping": 2,
    }
    content = settings(
        corpora, arms={"dropped": regularized}, models={"small": {}, "wide": {"hidden": 64}}
    )
    small, wide = all_trials(load_sweep(write(tmp_path, content)))
    assert (small.run["model"]["hidden"], wide.run["model"]["hidden"]) == (32, 64)
    assert wide.name == "wide-dropped-r0.2-p0.01-s11"
    assert wide.run["model"]["dropout"] == 0.1
    assert wide.run["optimizer"]["weight_decay"] == 0.3
    stop = {"overfit": {"tasks": list(LOW), "patience": 2, "when": "all"}}
    assert wide.run["phases"][0]["stop"] == stop
    assert wide.takes_best


RAMP = {"ramp": {"from": 2, "step": 2, "tokens": 100}}
SHORT_SAMPLES = {"rate": 0.1, "batch": {"samples": 16}, "model": {"seq_len": 16}}
ODD_BATCH = {"share": 0.2, "rate": 0.1, "batch": {"samples": 7, "micro": 2}}
LION = {"rate": 0.1, "optimizer_state": "keep", "settings": {"optimizer.name": "lion"}}
HARNESS = {"tasks": ["belebele_eng_Latn"], "every_steps": 10}
NVME = {"zero": 3, "offload": "nvme", "offload_folder": "disk"}
ONCE_LOW = {"proportional": True, "over": list(LOW), "max_epochs": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, ": give the budget of a run, either steps or tokens"),
        ({"low": ["nobody"]}, ": low: no task 'nobody'; the tasks are alda, boreth, cimri"),
        ({"low": [HIGH[0], *LOW]}, f": low: {HIGH[0]} is also in high; remove it from one"),
        ({"settings": {"phases.0.steps": 3}}, ": settings.phases.0.steps: the sweep sets this"),
        ({"arms": {"best": {"rates": [0.1]}}}, ": arms.best: 'best' is not a kind of arm; add"),
        ({"arms": {"static": {}}}, ": arms.static: static needs rates or temperatures"),
        ({"arms": {"static": {"rates": [1.5]}}}, ": arms.static.rates[0]: must be less than 1"),
        ({"arms": {"keep": {"rates": [0.1]}}}, ": arms.keep.pretrain: keep needs shares"),
        ({"arms": {"regularized": {"rates": [0.1]}}}, "regularized is like static without"),
        ({"learning_rate": {"peaks": []}}, ": learning_rate.peaks: must hold at least one entry"),
        ({"seeds": [3, 3]}, ": seeds: 3 occurs twice in this list"),
        ({"translation": {}}, ": translation: there is no translation task"),
        ({"models": {"odd": {"hiden": 3}}}, ": models.odd.hiden: unknown key 'hiden'"),
        (
            {"models": {"odd": {"seq_len": 16}, "base": {}}},
            ": models.odd: changes model.seq_len, which must be the same in all arms and models",
        ),
        (
            {"arms": {"pretrain": {"kind": "static", "rates": [0.1]}}},
            ": arms.pretrain: is the name",
        ),
        ({"settings": {"model.hiden": 3}}, ": settings.model.hiden: unknown key 'hiden'"),
        (
            {"arms": {"static": {"rates": [0.1], "settings": {"model.dropout": 2}}}},
            ": arms.static.settings.model.dropout: must be less than 1",
        ),
        *(
            (
                {
                    "arms": {
                        "static": {"rates": [0.1]},
                        "odd": {"kind": "static", "rates": [0.1], "settings": {key: value}},
                    }
                },
                f": arms.odd: changes {what}, which must be the same in all arms and models",
            )
            for key, value, what in (
                ("model.seq_len", 16, "model.seq_len"),
                ("batch.samples", 16, "batch.samples"),
                ("phases[0].batch", {"samples": 16}, "the tokens of a step"),
                ("phases[*].batch", RAMP, "the tokens of a step by a ramp"),
                ("phases[0].model", {"seq_len": 16}, "the tokens of a step"),
                ("tokenizer", "other", "the tokenizer"),
                ("bos", True, "bos"),
                (
                    f"tasks.{LOW[0]}.attend_across_documents",
                    False,
                    f"tasks.{LOW[0]}.attend_across_documents",
                ),
                (f"tasks.{LOW[0]}.corpus", "other", f"the corpus of {LOW[0]}"),
                ("validation.harness", HARNESS, "validation.harness"),
                ("parallel", NVME, "parallel.offload_folder"),
            )
        ),
        (
            {"arms": {"cap": {"phases": [{"mixture": {"unimax": True, "max_epochs": 0.001}}]}}},
            ": arms.cap.phases[0].mixture: the phase wants 80 samples, but max_epochs 0.001 leaves",
        ),
        (
            {"arms": {"of-low": {"phases": [{"share": 0.5, "rate": 1}, {"mixture": ONCE_LOW}]}}},
            ": arms.of-low.phases[1].mixture: the phase wants 40 samples, but max_epochs",
        ),
        (
            {"arms": {"odd": {"phases": [{"mixture": {"rates": {"nobody": 1.0}}}]}}},
            ": arms.odd.phases[0].mixture.rates: no task 'nobody' with a corpus under tasks",
        ),
        (
            {"arms": {"odd": {"phases": [{"share": 0.5, "rate": 0}, ODD_BATCH, {"rate": 0.1}]}}},
            ": arms.odd.phases[1].batch.micro: 2 does not divide the 7 samples of a step; change",
        ),
        (
            {"arms": {"odd": {"phases": [{"rate": 0.1, "learning_rate": {"peak": [1e-3, None]}}]}}},
            ": arms.odd.phases[0].learning_rate.peak: one of the values to try is empty; write a",
        ),
        (
            {"settings": {"batch.ramp": RAMP["ramp"]}},
            ": settings.batch.ramp: a ramp would begin again in every stage of an arm, so",
        ),
        (
            {"settings": {"checkpoint.end_after": 4}},
            ": settings.checkpoint.end_after: would end runs before they have spent the budget",
        ),
        (
            {"arms": {"static": {"rates": [0.1], "settings": {"checkpoint.end_after": 4}}}},
            ": arms.static.settings.checkpoint.end_after: would end runs before they have spent",
        ),
        (
            {"arms": {"odd": {"phases": [{"share": 0.5, "rate": 0}, SHORT_SAMPLES]}}},
            ": arms.odd: changes model.seq_len, which must be the same in all arms and models",
        ),
        (
            {
                "arms": {
                    "odd": {
                        "phases": [
                            {"share": 0.5, "rate": 0, "batch": {"samples": 2}},
                            {"rate": 0.1},
                        ]
                    }
                }
            },
            ": arms.odd: changes the tokens of a step, which must be the same in all arms",
        ),
        (
            {"arms": {"odd": {"phases": [{"share": 0.5, "rate": 0}, LION]}}},
            ": arms.odd.phases[1].optimizer_state: is keep, but the phase before has the state of",
        ),
        (
            {"arms": {"static": {"rates": [0.1], "settings": {"seed": 3}}}},
            ": arms.static.settings.seed: the sweep sets this; leave it out",
        ),
        (
            {"primary": {"arm": "two-fase", "against": "static"}},
            ": primary.arm: no arm 'two-fase'; did you mean 'two-phase'?",
        ),
        (
            {"primary": {"arm": "two-phase", "against": ["static", "keep"]}},
            ": primary.against: no arm 'keep'; the arms are static, two-phase",
        ),
        (
            {"primary": {"arm": "static", "against": "static"}},
            ": primary.against: static is compared with itself; name another arm",
        ),
        (
            {"primary": {"arm": "two-phase", "against": "static", "loss": "average"}},
            ": primary.loss: no loss 'average'; the losses are mean, high, low, ",
        ),
        (
            {"primary": {"arm": "two-phase", "against": "static", "model": "small"}},
            ": primary.model: no model 'small'; leave it out",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str, corpora: Path, tmp_path: Path) -> None:
    path = write(tmp_path, settings(corpora, **changes))
    with pytest.raises(InputError) as caught:
        open_sweep(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_runs_of_other_settings_are_refused(corpora: Path, tmp_path: Path) -> None:
    path = write(tmp_path, settings(corpora))
    sweep, directory = open_sweep(path)
    for trial in known_trials(sweep, {}):
        directory.write_run_file(sweep, trial)
    write(tmp_path, settings(corpora, seeds=[11, 12]))
    open_sweep(path)  # more of them are welcome
    write(tmp_path, settings(corpora, steps=STEPS + 1))
    before = directory.sweep_file.read_text()
    with pytest.raises(InputError, match=r"was written with other values of phases\[0\]\.steps"):
        open_sweep(path)
    with pytest.raises(InputError, match=r"phases\[0\]\.steps"):
        dry_run(path, Console(quiet=True))
    assert directory.sweep_file.read_text() == before


def test_an_added_task_is_refused_by_its_key_and_no_result_is_blamed(
    corpora: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, settings(corpora, high=[HIGH[0]]))
    sweep, directory = open_sweep(path)
    for trial in known_trials(sweep, {}):
        directory.write_run_file(sweep, trial)
        losses = dict.fromkeys([*sweep.high, *sweep.low], 3.0)
        directory.write_outcome(trial.name, Outcome(step=1, losses=losses))
    write(tmp_path, settings(corpora, high=list(HIGH)))
    with pytest.raises(InputError, match=rf"with other values of tasks\.{HIGH[1]}"):
        open_sweep(path)


def test_other_text_under_the_same_name_is_refused_once_a_run_has_ended(
    corpora: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpora, own := tmp_path / "corpora")
    path = write(tmp_path, settings(own))
    open_sweep(path)
    for file in own.glob(f"data/{HIGH[1]}.*"):
        shutil.copy(file, own / "data" / f"{LOW[0]}{file.suffix}")
    sweep, directory = open_sweep(path)  # no run has ended yet
    (trial, *_) = known_trials(sweep, {})
    directory.write_outcome(trial.name, invented(trial, 1e-2))
    open_sweep(path)
    for file in own.glob(f"data/{HIGH[0]}.*"):
        shutil.copy(file, own / "data" / f"{LOW[0]}{file.suffix}")
    with pytest.raises(InputError) as caught:
        open_sweep(path)
    assert str(caught.value) == (
        f"{path}: the corpus of {LOW[0]} is not the one with which runs have ended; put that back, "
        "or choose another output"
    )
    content = directory.sweep_file.read_text()
    record = json.loads(content)
    assert record.pop("inputs")["the tokenizer"]
    directory.sweep_file.write_text(json.dumps(record))  # as earlier versions wrote it
    open_sweep(path)


def test_a_moved_sweep_is_refused_with_the_keys_that_have_paths(
    corpora: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, settings(corpora))
    sweep, directory = open_sweep(path)
    for trial in known_trials(sweep, {}):
        directory.write_run_file(sweep, trial)
    (tmp_path / "out").rename(tmp_path / "moved")
    write(tmp_path, settings(corpora, output="moved"))
    with pytest.raises(InputError, match=r"other values of output; .*nor its inputs may be moved"):
        open_sweep(path)
    file = SweepDirectory(tmp_path / "moved").run_file(known_trials(sweep, {})[0].name)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match=f"{file.name}: this is not UTF-8 text"):
        open_sweep(path)


def test_a_sweep_that_another_process_runs_is_left_as_it_is(corpora: Path, tmp_path: Path) -> None:
    path = write(tmp_path, settings(corpora))
    _, directory = open_sweep(path)
    directory.write_outcome("any", Outcome(failed="killed"))
    write(tmp_path, settings(corpora, seeds=[11, 12]))
    before = {file: file.read_bytes() for file in directory.path.rglob("*") if file.is_file()}
    with directory.locked():
        command = [sys.executable, "-m", "megaphase", "sweep", str(path), "--retry"]
        ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "another process runs this sweep" in ended.stderr
    after = {file: file.read_bytes() for file in directory.path.rglob("*") if file.is_file()}
    assert after == before


PHASES = "[{name: any, steps: 1, mixture: {proportional: true}, learning_rate: {peak: 1e-3}}]"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "paper"


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(EXAMPLES))
)
def test_examples_are_sound(path: Path) -> None:
    content = read_yaml(path)
    if "arms" not in content:
        load_run_file(path, () if "phases" in content else (f"phases={PHASES}",))
        return
    config = SweepConfig.model_validate(content)
    assert isinstance(config.run, Path)
    assert (path.parent / config.run).is_file()


def test_every_run_uploads_into_a_folder_of_its_own(corpora: Path, tmp_path: Path) -> None:
    checkpoint = {"checkpoint.upload": "s3://bucket/sweep/"}
    arms = {"static": {"rates": [0.1, 0.3]}}
    content = settings(corpora, arms=arms, settings=checkpoint, seeds=[1, 2])
    for trial in known_trials(load_sweep(write(tmp_path, content)), {}):
        assert trial.run["checkpoint"]["upload"] == f"s3://bucket/sweep/{trial.name}"
