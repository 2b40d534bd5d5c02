"""examples/paper/annealing.py: the choice and the contrasts of a comparison planned beforehand."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats
from sweep_support import HIGH, LOW, record_of, write_sweep

from megaphase.sweep.directory import load_sweep_record
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.trials import known_trials
from megaphase.utils.errors import InputError

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "paper" / "annealing.py"


@pytest.fixture(scope="module")
def annealing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("annealing", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["annealing"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe(rate: float, peak: float = 2e-3) -> Any:
    return ((1050, 0.0, "inverse_sqrt", 4e-3, False), (450, rate, "linear", peak, False))


def runs(module: ModuleType, arm: str, rate: float, high: float, low: float, **more: Any) -> Any:
    """Two runs around these losses, on both splits; with more: other seeds, or losses on one."""
    seeds = more.get("seeds", (1, 2))
    return [
        module.Run(
            arm,
            recipe(rate),
            seed,
            {"en": high + 0.01 * seed, "hi": low - 0.01 * seed},
            {"en": high, "hi": low + more.get("noise", 0.0) * seed},
            {"en": high / 2, "hi": low / 2},
        )
        for seed in seeds
    ]


def groups(module: ModuleType) -> Any:
    return module.Groups(["en"], ["hi"])


def screened(module: ModuleType) -> list[Any]:
    found = []
    for arm in module.ARMS:
        found += runs(module, arm, 0.06, 3.0, 5.0)
        found += runs(module, arm, 0.08, 3.06, 4.9)
        found += runs(module, arm, 0.1, 3.04, 4.97)
        found += runs(module, arm, 0.12, 3.04, 5.1)
    return found


def test_the_first_choice_has_the_lowest_mean_the_second_the_lowest_low_loss_at_little_cost(
    annealing: ModuleType,
) -> None:
    chosen = annealing.choose(screened(annealing), groups(annealing))
    assert chosen == {arm: [recipe(0.08), recipe(0.1)] for arm in annealing.ARMS}


def test_without_a_second_within_the_limit_the_second_lowest_mean_is_chosen(
    annealing: ModuleType,
) -> None:
    found = []
    for arm in annealing.ARMS:
        found += runs(annealing, arm, 0.06, 3.0, 5.0)
        found += runs(annealing, arm, 0.08, 3.2, 4.95)
        found += runs(annealing, arm, 0.1, 3.2, 4.9)
    chosen = annealing.choose(found, groups(annealing))
    assert chosen["keep"] == [recipe(0.06), recipe(0.1)]


def test_a_setting_that_diverged_is_not_chosen(annealing: ModuleType) -> None:
    found = screened(annealing)
    index = next(i for i, run in enumerate(found) if run.recipe == recipe(0.08))
    lost = annealing.Run("static", recipe(0.08), found[index].seed, {}, {}, {}, True)
    chosen = annealing.choose([*found[:index], lost, *found[index + 1 :]], groups(annealing))
    assert recipe(0.08) not in chosen["static"]
    assert recipe(0.08) in chosen["restart"]


def test_the_chosen_settings_are_written_as_arms(annealing: ModuleType) -> None:
    keep = ((1275, 0.0, "linear", 4e-3, False), (225, 0.12, "linear", 4e-3, True))
    section = yaml.safe_load(
        annealing.confirmed_sections({"keep": [keep], "two-phase": [recipe(0.1)]})
    )
    assert section["arms"]["keep-1"]["phases"] == [
        {"share": 0.85, "rate": 0, "learning_rate": {"schedule": "linear", "peak": 0.004}},
        {"rate": 0.12, "learning_rate": "continue"},
    ]
    assert section["primary"] == {"arm": "two-phase-1", "against": ["restart-1"]}
    assert section["arms"]["two-phase-1"]["phases"][1] == {
        "rate": 0.1,
        "learning_rate": {"schedule": "linear", "peak": 0.002},
    }


def confirmed(module: ModuleType, seeds: Any) -> tuple[Any, list[list[Any]]]:
    """The two settings of each arm, which differ between arms, and their runs by set."""
    own = {arm: [recipe(0.01 * i), recipe(0.1 + 0.01 * i)] for i, arm in enumerate(module.ARMS, 1)}
    sets: list[list[Any]] = [[] for _ in seeds]
    for found, of_set in zip(sets, seeds, strict=True):
        for i, arm in enumerate(module.ARMS, 1):
            for rate in (0.01 * i, 0.1 + 0.01 * i):
                noise = 0.02 if arm == "two-phase" else 0.01
                low = 5.0 - 0.1 * i
                found += runs(module, arm, rate, 3.0, low, seeds=of_set, noise=noise)
    return own, sets


def test_the_primary_contrast_is_paired_by_seed_with_sets_as_blocks(annealing: ModuleType) -> None:
    own, sets = confirmed(annealing, annealing.SEEDS)
    lines = annealing.table(own, sets, groups(annealing))
    # Low: 4.6 + 0.02 seed against 4.8 + 0.01 seed; S is half of the difference. By numpy and scipy:
    values = [np.array([-0.1 + 0.005 * seed for seed in seeds]) for seeds in annealing.SEEDS]
    variance = sum(((each - each.mean()) ** 2).sum() for each in values) / 7
    error = np.sqrt(variance * sum(1 / len(each) for each in values)) / 3
    mean, half = np.mean([each.mean() for each in values]), stats.t.ppf(0.9875, 7) * error
    p = 2 * stats.t.sf(abs(mean) / error, 7)
    assert abs(mean) > half
    assert lines[0] == (
        f"primary: two-phase - restart, S: {mean:+.4f} ± {half:.4f} (p = {p:.3g}): the order gains"
    )
    assert lines[1] == "by set of documents: " + ", ".join(f"{e.mean():+.4f}" for e in values)
    assert lines[2].startswith("bits per byte: -0.0500 ± ")
    assert sum(line.startswith(("| first", "| second")) for line in lines) == 2 * 5 * 5 - 1
    [low] = [line for line in lines if line.startswith("| first | two-phase - restart | low |")]
    assert low.endswith("| " + ", ".join(f"{2 * e.mean():+.4f}" for e in values) + " |")


def test_a_setting_of_which_a_run_diverged_has_lost(annealing: ModuleType) -> None:
    own, sets = confirmed(annealing, annealing.SEEDS)
    for i, run in enumerate(sets[1]):
        if (run.arm, run.recipe) in (("keep", own["keep"][1]), ("restart", own["restart"][0])):
            sets[1][i] = annealing.Run(run.arm, run.recipe, run.seed, {}, {}, {}, True)
    lines = annealing.table(own, sets, groups(annealing))
    assert lines[0] == "primary: two-phase - restart: restart lost (diverged: restart 3 of 10)"
    assert (
        "| first | restart - static | all | restart lost (diverged: restart 3 of 10) | | | |"
        in lines
    )
    assert "| second | keep - static | all | keep lost (diverged: keep 3 of 10) | | | |" in lines
    assert sum("| first | keep - static |" in line for line in lines) == 5


def test_a_first_stage_that_diverged_is_counted_and_does_not_stop_the_result(
    annealing: ModuleType,
) -> None:
    arms = {kind: {"rates": [0.1], "pretrain": [0.8]} for kind in ("keep", "two-phase")}
    first = record_of(arms, None, seeds=[1, 2], ended=lambda trial: not trial.is_final)
    outcomes = dict(first.outcomes)
    lost = Outcome(step=9, diverged="at step 9", losses=dict.fromkeys((*HIGH, *LOW), math.nan))
    outcomes |= {trial.name: lost for trial in first.trials if trial.seed == 2}
    sweep, directory = first.sweep, first.directory
    found = annealing.SweepRecord(directory, sweep, known_trials(sweep, outcomes), outcomes)
    # Two-phase has no second stages, since a first one with its only peak is lost.
    with pytest.raises(InputError, match=r"^keep-0\.8-r0\.1-p0\.004-s1: has failed or not"):
        annealing.runs_of(found)
    outcomes["keep-0.8-r0.1-p0.004-s1"] = Outcome(step=60, losses=dict.fromkeys((*HIGH, *LOW), 4.0))
    runs = {(run.arm, run.seed): run for run in annealing.runs_of(found)}
    assert {each for each, run in runs.items() if run.diverged} == {("keep", 2), ("two-phase", 2)}
    assert {each for each, run in runs.items() if run.validation} == {("keep", 1)}
    assert runs.keys() == {(arm, seed) for arm in arms for seed in (1, 2)}


def test_other_seeds_than_those_of_the_plan_are_refused(annealing: ModuleType) -> None:
    own, sets = confirmed(annealing, ((11, 12), (15, 16, 17), (18, 19, 20)))
    with pytest.raises(InputError, match="seeds"):
        annealing.table(own, sets, groups(annealing))


def test_runs_without_a_test_split_are_refused(annealing: ModuleType) -> None:
    (run, _) = runs(annealing, "static", 0.06, 3.0, 5.0)
    bare = annealing.Run(run.arm, run.recipe, run.seed, run.validation, {}, {})
    with pytest.raises(InputError, match="no losses on a test split"):
        annealing.table({}, [[bare]], groups(annealing))


@pytest.mark.parametrize(("rates", "is_given"), [([0.05, 0.5], True), ([0.01, 0.02], False)])
def test_the_premise_is_that_the_low_resource_loss_rises(
    annealing: ModuleType, tmp_path: Path, rates: list[float], is_given: bool
) -> None:
    folder = write_sweep(tmp_path / "sweep", {"static": {"rates": rates}}, seeds=[1, 2])
    risen = {}
    for peak in (0.001, 0.004):
        files = [folder / "runs" / f"static-r{rates[1]}-p{peak}-s{seed}" for seed in (1, 2)]
        lines = [(file / "metrics.jsonl").read_text().splitlines() for file in files]
        runs = [[row for row in map(json.loads, own) if "validation" in row] for own in lines]
        losses = np.array(
            [[[row["validation"][task]["loss"] for task in LOW] for row in own] for own in runs]
        ).mean(axis=(0, 2))
        risen[peak] = losses[-1] - losses.min()
    assert (max(risen.values()) >= 0.05) == is_given
    assert annealing.premise(load_sweep_record(folder)) == [
        f"static, {rates[1]:.1%}, peak 0.001: ends {risen[0.001]:.3f} nats above its lowest",
        f"static, {rates[1]:.1%}, peak 0.004: ends {risen[0.004]:.3f} nats above its lowest",
        f"premise: {'given' if is_given else 'not given'}",
    ]


def test_the_premise_needs_static_runs(annealing: ModuleType, tmp_path: Path) -> None:
    arms = {"two-phase": {"rates": [0.1], "pretrain": [0.8]}}
    with pytest.raises(InputError, match="static: has no ended run"):
        annealing.premise(load_sweep_record(write_sweep(tmp_path / "sweep", arms)))
