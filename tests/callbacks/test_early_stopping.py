"""Early stopping compared with a slow reference, and interrupted anywhere by a restart."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphase.callbacks.early_stopping import EarlyStopping, PhaseEnd
from megaphase.config.load import load_run_file
from megaphase.config.run import RunConfig

TASKS = ["en", "hi", "eu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("monitor")


def early_stopping(config: RunConfig) -> EarlyStopping:
    return EarlyStopping(config.monitor, config.monitored_tasks(), config.stop_conditions())


def make_config(folder: Path, stops: list[dict[str, Any]], monitor: dict[str, Any]) -> RunConfig:
    phases = [
        {
            "name": f"p{number}",
            "steps": 10,
            "mixture": {"proportional": True},
            "learning_rate": {"peak": 1e-3},
            "stop": stop,
        }
        for number, stop in enumerate(stops)
    ]
    data = {
        "output": "run",
        "tokenizer": "tok",
        "tasks": {t: {"corpus": t, "role": "high" if t == "en" else "low"} for t in TASKS},
        "model": {"preset": "gpt-1m", "seq_len": 8},
        "batch": {"samples": 4},
        "phases": phases,
        "monitor": monitor,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return load_run_file(path)


def overfit(**keys: Any) -> dict[str, Any]:
    return {"overfit": keys}


def losses(hi: float, eu: float = 1.0, en: float = 1.0) -> dict[str, float]:
    return {"en": en, "hi": hi, "eu": eu}


def stops_of(monitor: EarlyStopping, of_hi: list[float], first_step: int = 0) -> list[str | None]:
    return [monitor.observe(first_step + 10 * i, losses(loss)).stop for i, loss in enumerate(of_hi)]


def test_a_task_has_overfit_after_its_patience(folder):
    config = make_config(folder, [overfit(tasks=["hi"], patience=3)], {})
    found = stops_of(early_stopping(config), [3.0, 2.5, 2.6, 2.4, 2.4, 2.5, 2.41, 2.3])
    said = "hi has overfit: no gain for 3 validations (best 2.4000 at step 30)"
    assert found == [None] * 6 + [said, None]


def test_small_gains_add_up(folder):
    config = make_config(folder, [overfit(tasks=["hi"], patience=2, min_gain=0.25)], {})
    found = stops_of(early_stopping(config), [3.0, 2.875, 2.625, 2.5, 2.375])
    assert found[:4] == [None] * 4
    assert found[4] == "hi has overfit: no gain for 2 validations (best 2.6250 at step 20)"


def test_all_tasks_of_a_role_or_any(folder):
    hi = "hi has overfit: no gain for {} (best 3.0000 at step 0)"
    eu = "eu has overfit: no gain for 1 validation (best 2.0000 at step 10)"
    said = {
        "any": [None, hi.format("1 validation"), f"{hi.format('2 validations')}; {eu}"],
        "all": [None, None, f"{hi.format('2 validations')}; {eu}"],
    }
    for when, expected in said.items():
        config = make_config(folder, [overfit(tasks="low", patience=1, when=when)], {})
        monitor = early_stopping(config)
        seen = [losses(3.0, 3.0), losses(3.0, 2.0), losses(3.0, 2.0)]
        assert [monitor.observe(10 * i, each).stop for i, each in enumerate(seen)] == expected


def test_losses_that_are_reached_end_a_phase(folder):
    config = make_config(folder, [{"loss": {"hi": 2.5, "eu": 3}}, {}], {})
    monitor = early_stopping(config)
    said = "the loss of hi reached 2.5, the loss of eu reached 3"
    found = [
        monitor.observe(step, losses(hi, eu)).stop
        for step, (hi, eu) in enumerate([(2.0, 4.0), (2.6, 2.9), (math.nan, 2.0), (2.5, 3.0)])
    ]
    assert found == [None, None, None, said]
    monitor.begin_phase(1)
    assert monitor.observe(4, losses(1.0, 1.0)).stop is None


def test_patience_begins_anew_with_a_phase_and_bests_do_not(folder):
    stop = overfit(tasks=["hi"], patience=2)
    monitor = early_stopping(make_config(folder, [stop, stop], {"tasks": ["hi"]}))
    assert [v is None for v in stops_of(monitor, [2.0, 2.1, 2.2])] == [True, True, False]
    monitor.begin_phase(1)
    verdicts = [monitor.observe(20 + 10 * i, losses(x)) for i, x in enumerate([2.2, 2.1, 1.9])]
    assert [verdict.stop for verdict in verdicts] == [None] * 3
    assert [verdict.improved for verdict in verdicts] == [[], [], ["hi", "mean"]]
    assert monitor.best() == {"hi": (40, 1.9), "mean": (40, 1.9)}
    assert monitor.observe(50, losses(1.9)).stop is None
    said = "hi has overfit: no gain for 2 validations (best 1.9000 at step 40)"
    assert monitor.observe(60, losses(1.9)).stop == said


def test_a_step_that_is_observed_again_counts_once(folder):
    stop = overfit(tasks=["hi"], patience=2)
    monitor = early_stopping(make_config(folder, [stop, stop], {"tasks": ["hi"]}))
    monitor.observe(0, losses(2.0))
    for _ in range(5):
        assert monitor.observe(10, losses(2.0)).stop is None
    assert monitor.observe(20, losses(1.0)).improved == ["hi", "mean"]
    monitor.begin_phase(1)
    assert monitor.observe(20, losses(0.9)).improved == []
    assert monitor.observe(30, losses(1.0)).stop is None
    assert monitor.observe(40, losses(1.0)).stop is not None


def test_new_weights_at_the_same_step_may_be_the_best(folder):
    stop = overfit(tasks=["hi"], patience=1)
    monitor = early_stopping(make_config(folder, [stop, stop], {"tasks": ["hi"]}))
    assert monitor.observe(0, losses(2.0)).improved == ["hi", "mean"]
    assert monitor.observe(10, losses(1.5)).improved == ["hi", "mean"]
    monitor.begin_phase(1)
    found = monitor.observe(10, losses(1.25), new_weights=True)
    assert (found.improved, found.stop) == (["hi", "mean"], None)
    assert monitor.best() == {"hi": (10, 1.25), "mean": (10, 1.25)}
    assert monitor.observe(20, losses(1.375)).improved == []
    monitor.begin_phase(0)
    assert monitor.observe(20, losses(1.3125), new_weights=True).improved == []


def test_a_loss_that_is_not_finite_is_no_gain(folder):
    config = make_config(folder, [overfit(tasks=["hi"], patience=2)], {"tasks": ["hi", "eu"]})
    monitor = early_stopping(config)
    verdict = monitor.observe(0, losses(math.nan))
    assert [verdict.improved, verdict.stop] == [["eu"], None]
    verdict = monitor.observe(10, losses(-math.inf, math.nan))
    assert [verdict.improved, verdict.stop] == [
        [],
        "hi has overfit: no gain for 2 validations (no finite loss)",
    ]
    assert monitor.observe(20, losses(3.0)).improved == ["hi", "mean"]
    assert monitor.best() == {"eu": (0, 1.0), "hi": (20, 3.0), "mean": (20, 2.0)}


def test_the_mean_is_weighted(folder):
    monitor = early_stopping(
        make_config(folder, [{}], {"tasks": "low", "weights": {"hi": 3, "eu": 1}, "min_gain": 0.5})
    )
    assert monitor.observe(0, losses(2.0, 4.0)).improved == ["hi", "eu", "mean"]
    assert monitor.best()["mean"] == (0, 2.5)
    # eu gains 1.0, which is 0.25 of the mean: too little.
    assert monitor.observe(10, losses(2.0, 3.0)).improved == ["eu"]
    assert monitor.observe(20, losses(1.5, 3.0)).improved == ["mean"]
    assert monitor.best() == {"hi": (0, 2.0), "eu": (10, 3.0), "mean": (20, 1.875)}


def test_without_tasks_there_are_no_bests(folder):
    monitor = early_stopping(make_config(folder, [{}], {}))
    assert monitor.observe(0, losses(2.0)) == PhaseEnd([], None, dict.fromkeys(TASKS))
    assert monitor.best() == {}


def test_the_gap_is_that_to_the_training_loss_since_the_last_validation(folder):
    monitor = early_stopping(make_config(folder, [{}], {}))
    monitor.observe(0, losses(9.0))
    monitor.add_training_losses({"hi": 30.0, "en": 0.0}, {"hi": 10, "en": 0})
    monitor.add_training_losses({"hi": 20.0}, {"hi": 30})
    assert monitor.observe(1, losses(1.5)).gaps == {"en": None, "hi": 0.25, "eu": None}
    assert monitor.observe(2, losses(1.5)).gaps == dict.fromkeys(TASKS)


LOSS = st.floats(0, 4) | st.sampled_from([1.0, 1.5, 2.0, math.nan, math.inf])


@dataclass(frozen=True)
class Seen:
    """A validation, with the training losses before it; `phase` starts with its first one."""

    phase: int
    step: int
    losses: dict[str, float]
    training: list[tuple[float, int]]


@st.composite
def histories(draw: st.DrawFn) -> list[Seen]:
    """Two phases, the first validation of the second at the last step of the first."""
    lengths = [draw(st.integers(1, 12)), draw(st.integers(1, 12))]
    seen = []
    for phase, length in enumerate(lengths):
        for i in range(length):
            if phase == 1 and i == 0:
                seen.append(Seen(1, seen[-1].step, seen[-1].losses, []))
                continue
            found = {task: draw(LOSS) for task in TASKS}
            training = draw(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 9)), max_size=3))
            seen.append(Seen(phase, 10 * len(seen), found, training))
    return seen


SETTINGS = st.builds(
    lambda patience, gain, when, keep_gain, weights: (
        overfit(tasks="low", patience=patience, min_gain=gain, when=when),
        {"tasks": ["eu", "hi"], "min_gain": keep_gain} | ({"weights": weights} if weights else {}),
    ),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from(["all", "any"]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([None, {"hi": 2, "eu": 1}, {"hi": 1}]),
)


def play(monitor: EarlyStopping, seen: list[Seen]) -> list[PhaseEnd]:
    verdicts = []
    for each in seen:
        if each.phase != monitor.state_dict()["phase"]:
            monitor.begin_phase(each.phase)
        for loss_sum, tokens in each.training:
            monitor.add_training_losses({"hi": loss_sum}, {"hi": tokens})
        verdicts.append(monitor.observe(each.step, each.losses))
    return verdicts


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state, allow_nan=False))


@settings(max_examples=60, deadline=None)
@given(histories(), SETTINGS, st.data())
def test_a_run_that_was_stopped_anywhere_decides_the_same(folder, seen, chosen, data):
    stop, keep = chosen
    config = make_config(folder, [stop, stop], keep)
    uninterrupted = early_stopping(config)
    expected = play(uninterrupted, seen)
    cut = data.draw(st.integers(0, len(seen)))
    first, second = early_stopping(config), early_stopping(config)
    found = play(first, seen[:cut])
    second.load_state_dict(through_json(first.state_dict()))
    found += play(second, seen[cut:])
    # repr, because nan is not equal to itself
    assert repr(found) == repr(expected)
    assert second.best() == uninterrupted.best()
    assert second.state_dict() == uninterrupted.state_dict()


def test_training_losses_since_the_last_validation_survive_a_restart(folder):
    config = make_config(folder, [{}], {})
    first, second = early_stopping(config), early_stopping(config)
    first.add_training_losses({"hi": 0.1}, {"hi": 1})
    first.add_training_losses({"hi": 0.2}, {"hi": 2})
    second.load_state_dict(through_json(first.state_dict()))
    for monitor in (first, second):
        monitor.add_training_losses({"hi": 0.3}, {"hi": 4})
    assert first.observe(5, losses(1.0)) == second.observe(5, losses(1.0))


def running_best(series: list[tuple[int, float]], min_gain: float) -> list[tuple[int, float]]:
    """Return all losses of the series that were a new best at their time."""
    bests: list[tuple[int, float]] = []
    for step, loss in series:
        if math.isfinite(loss) and (not bests or loss < bests[-1][1] - min_gain):
            bests.append((step, loss))
    return bests


def has_overfit(series: list[tuple[int, float]], patience: int, min_gain: float) -> bool:
    """Return whether the last `patience` entries contain no new best."""
    best_steps = [step for step, _ in running_best(series, min_gain)]
    last = [step for step, _ in series[-patience:]]
    return len(last) == patience and not set(best_steps) & set(last)


@settings(max_examples=60, deadline=None)
@given(histories(), SETTINGS)
def test_patience_and_bests_are_those_of_the_reference(folder, seen, chosen):
    stop, keep = chosen
    monitor = early_stopping(make_config(folder, [stop, stop], keep))
    verdicts = play(monitor, seen)
    rule = stop["overfit"]
    weights = keep.get("weights", {"hi": 1, "eu": 1})
    by_name: dict[str, list[tuple[int, float]]] = {"eu": [], "hi": [], "mean": []}
    for i, (each, verdict) in enumerate(zip(seen, verdicts, strict=True)):
        shared = i > 0 and seen[i - 1].step == each.step
        if not shared:
            mean = sum(w * each.losses[t] for t, w in weights.items()) / sum(weights.values())
            for name, loss in (each.losses | {"mean": mean}).items():
                by_name.setdefault(name, []).append((each.step, loss))
        improved = [
            name
            for name in ("eu", "hi", "mean")
            if not shared
            and (each.step in [step for step, _ in running_best(by_name[name], keep["min_gain"])])
        ]
        assert verdict.improved == improved
        phase = [other for other in seen[: i + 1] if other.phase == each.phase]
        over = [
            has_overfit(
                [(o.step, o.losses[task]) for o in phase], rule["patience"], rule["min_gain"]
            )
            for task in ("hi", "eu")
        ]
        assert (verdict.stop is not None) == (any(over) if rule["when"] == "any" else all(over))
    for name in ("eu", "hi", "mean"):
        bests = running_best(by_name[name], keep["min_gain"])
        assert monitor.best().get(name) == (bests[-1] if bests else None)
