"""The kinds of arms keep the names and the run files that they had before there were other arms, so
that directories of earlier sweeps resume.

short_forms.json holds SHA-256 of every run file that commit 627860a wrote for these sweeps.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from sweep_support import sweep_of

from megaphase.sweep.directory import run_file_text
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.trials import Trial, known_trials

EXPECTED = json.loads(Path(__file__).with_name("short_forms.json").read_text())
ARMS: dict[str, dict[str, Any]] = {
    "static": {"rates": [0.02, 0.1, 0.10000001], "temperatures": [3.3]},
    "two-phase": {"pretrain": [0.7, 0.85], "rates": [0.1, 0.25], "temperatures": [5]},
    "restart": {"pretrain": [0.85], "rates": [0.05, 0.1]},
    "keep": {"pretrain": [0.285], "rates": [0.1], "temperatures": [2]},
    "low-only": {"pretrain": [0.85]},
    "dropped": {
        "kind": "regularized",
        "rates": [0.05],
        "settings": {"model.dropout": 0.1, "optimizer.betas": [0.9, 0.99]},
        "early_stopping": 3,
    },
    "stopped": {"kind": "two-phase", "pretrain": [0.85], "rates": [0.1], "early_stopping": 2},
    "decayed": {
        "kind": "keep",
        "pretrain": [0.7],
        "rates": [0.3],
        "settings": {"optimizer.weight_decay": 0.3},
    },
    "fallen": {
        "kind": "two-phase",
        "pretrain": [0.7],
        "rates": [0.3],
        "settings": {"model.dropout": 0.2},
    },
}
SWEEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "models": {
        "models": {"small": {}, "large": {"layers": 4}},
        "seeds": [1, 2],
        "within": {"high": 1, "low": 3},
        "learning_rate": {
            "peaks": [0.001, 0.004],
            "schedule": "inverse_sqrt",
            "warmup": 0.1,
            "final": 0.0,
        },
    },
}


def trained(best: float, arms: dict[str, Any], **more: Any) -> list[Trial]:
    """Return all runs of a sweep in which the peak `best` has the lowest losses."""
    sweep, outcomes = sweep_of(Path("somewhere/sweep"), arms, **more), {}
    sweep.base["model"] = {"preset": "gpt-tiny"}  # as in the run files of short_forms.json
    while True:
        trials = known_trials(sweep, outcomes)
        new = [trial for trial in trials if trial.name not in outcomes]
        if not new:
            return trials
        for trial in new:
            loss = 3 + abs(trial.peak - best)
            losses = dict.fromkeys([*sweep.high, *sweep.low], loss)
            outcomes[trial.name] = Outcome(step=60, losses=losses)


@pytest.mark.parametrize("name", EXPECTED)
def test_run_files_are_bit_for_bit_those_of_earlier_versions(name: str) -> None:
    found = {
        trial.name: hashlib.sha256(run_file_text(trial).encode()).hexdigest()
        for best in (0.001, 0.004)
        for trial in trained(best, ARMS, **SWEEPS[name])
    }
    assert found == EXPECTED[name]


def test_settings_have_the_axes_of_their_arm() -> None:
    by_name = {trial.name: trial for trial in trained(0.004, ARMS)}
    static = by_name["static-t3.3-p0.001-s1234"].setting
    assert static.values == (("temperature", 3.3), ("peak", 0.001))
    assert (static.label, static.share, static.peak) == ("T = 3.3", None, 0.001)
    trial = by_name["two-phase-0.7-r0.25-f0.004-p0.001-s1234"]
    assert trial.setting.values == (("pretrain_share", 0.7), ("rate", 0.25), ("peak", 0.001))
    assert trial.setting.get("rate") == 0.25
    assert trial.setting.get("temperature") is None
    assert trial.setting.peaks == (0.004, 0.001)
    assert trial.setting.label == "25% after 70%"
    assert [phase["name"] for phase in trial.phases] == ["pretrain", "joint"]
    assert [phase["steps"] for phase in trial.phases] == [42, 18]
    assert trial.phases[-1] == trial.run["phases"][0]
    other = by_name["two-phase-0.7-r0.25-p0.004-s1234"].setting
    assert other.without_last_peak == trial.setting.without_last_peak
    assert other != trial.setting
