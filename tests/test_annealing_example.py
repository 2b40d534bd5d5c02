"""examples/paper/annealing.py: the choice and the contrasts of a comparison planned beforehand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

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
    lost = annealing.Run("static", recipe(0.08), found[index].seed, {}, {}, {})
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


def test_the_primary_contrast_is_paired_by_seed_on_the_test_split(annealing: ModuleType) -> None:
    # Recipes differ between arms here, as they do in the sweeps.
    own = {
        arm: [recipe(0.01 * i), recipe(0.1 + 0.01 * i)] for i, arm in enumerate(annealing.ARMS, 1)
    }
    sets = [[], []]
    for number, seeds in enumerate(((11, 12), (13,))):
        for i, arm in enumerate(annealing.ARMS, 1):
            for rate in (0.01 * i, 0.1 + 0.01 * i):
                noise = 0.02 if arm == "two-phase" else 0.01
                low = 5.0 - 0.1 * i
                sets[number] += runs(annealing, arm, rate, 3.0, low, seeds=seeds, noise=noise)
    lines = annealing.table(own, sets, groups(annealing))
    # Low: 4.6 + 0.02 seed against 4.8 + 0.01 seed; S is half of the difference.
    assert lines[0].startswith("primary: two-phase - restart, S: -0.0400 ± 0.0124")
    assert lines[1] == "by set of documents: -0.0425, -0.0350"
    assert lines[2] == "bits per byte: -0.0500"
    assert sum(line.startswith(("| first", "| second")) for line in lines) == 2 * 5 * 5 - 1


def test_runs_without_a_test_split_are_refused(annealing: ModuleType) -> None:
    (run, _) = runs(annealing, "static", 0.06, 3.0, 5.0)
    bare = annealing.Run(run.arm, run.recipe, run.seed, run.validation, {}, {})
    with pytest.raises(InputError, match="no losses on a test split"):
        annealing.table({}, [[bare]], groups(annealing))
