"""Learning-rate schedules against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaphase.config import LearningRateConfig
from megaphase.training.schedules import learning_rate

WARM_UP_OF_4 = {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1.0}


def schedule(name: str, **settings: float) -> LearningRateConfig:
    return LearningRateConfig.model_validate(
        {"schedule": name, "peak": 1.0, "final": 0.1, **settings}
    )


TABLES = {
    "cosine": (
        schedule("cosine", warmup_steps=4),
        13,
        WARM_UP_OF_4 | {6: 0.8681980515, 8: 0.55, 10: 0.2318019485, 12: 0.1},
    ),
    "cosine without warm-up": (schedule("cosine"), 5, {0: 1.0, 2: 0.55, 4: 0.1}),
    "linear": (
        schedule("linear", warmup_steps=4),
        13,
        WARM_UP_OF_4 | {5: 0.8875, 6: 0.775, 8: 0.55, 10: 0.325, 12: 0.1},
    ),
    "constant": (schedule("constant", warmup_steps=4), 13, WARM_UP_OF_4 | {5: 1.0, 12: 1.0}),
    "inverse_sqrt": (
        schedule("inverse_sqrt", warmup_steps=4),
        5000,
        WARM_UP_OF_4 | {9: 2 / 3, 16: 0.5, 36: 1 / 3, 100: 0.2, 400: 0.1, 4999: 0.1},
    ),
    "inverse_sqrt without warm-up": (
        schedule("inverse_sqrt"),
        50,
        {0: 1.0, 1: 1.0, 4: 0.5, 16: 0.25, 25: 0.2},
    ),
    "wsd": (
        schedule("wsd", warmup_steps=4, decay_steps=4),
        20,
        WARM_UP_OF_4 | {10: 1.0, 16: 1.0, 17: 0.7, 18: 0.4, 19: 0.1},
    ),
    "wsd that decays for longer than the phase": (
        schedule("wsd", warmup_steps=1, decay_steps=100),
        5,
        {0: 0.5, 1: 1.0, 2: 0.7, 3: 0.4, 4: 0.1},
    ),
    "down to nothing": (
        LearningRateConfig(schedule="linear", peak=3e-4, warmup_steps=1),
        4,
        {0: 1.5e-4, 1: 3e-4, 2: 1.5e-4, 3: 0.0},
    ),
}
NAMES = ["cosine", "linear", "inverse_sqrt", "constant", "wsd"]


def any_schedule(name: str, warmup_steps: int) -> LearningRateConfig:
    extra = {"decay_steps": 3} if name == "wsd" else {}
    return schedule(name, warmup_steps=warmup_steps, **extra)


@pytest.mark.parametrize("table", TABLES)
def test_values(table: str) -> None:
    config, steps, expected = TABLES[table]
    found = {step: learning_rate(config, step, steps) for step in expected}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_step_is_taken_at_the_peak(name: str) -> None:
    assert learning_rate(any_schedule(name, 0), 0, 1) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_longer_than_the_phase_just_goes_on_rising(name: str) -> None:
    config = any_schedule(name, 10)
    rates = [learning_rate(config, step, 3) for step in range(3)]
    assert rates == pytest.approx([1 / 11, 2 / 11, 3 / 11])


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_up_to_the_last_step_ends_at_the_peak(name: str) -> None:
    assert learning_rate(any_schedule(name, 3), 3, 4) == 1.0


@given(
    name=st.sampled_from(NAMES),
    warmup_steps=st.integers(0, 30),
    steps=st.integers(1, 60),
)
def test_rises_to_the_peak_and_never_again(name: str, warmup_steps: int, steps: int) -> None:
    config = any_schedule(name, warmup_steps)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    after = rates[warmup_steps:]
    assert after == sorted(after, reverse=True)
    assert min(after, default=1.0) >= 0.1 - 1e-12
