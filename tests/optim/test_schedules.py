"""Learning-rate schedules compared with values computed by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaphase.optim.schedules import LearningRateConfig, learning_rate

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
    "wsd that decays in one step": (
        schedule("wsd", warmup_steps=1, decay_steps=1),
        5,
        {0: 0.5, 1: 1.0, 2: 1.0, 3: 1.0, 4: 0.1},
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


@given(
    name=st.sampled_from(NAMES),
    warmup_steps=st.integers(0, 30),
    steps=st.integers(2, 60),
    data=st.data(),
)
def test_a_schedule_cut_in_two_phases_is_the_whole_one(
    name: str, warmup_steps: int, steps: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, steps - 1))
    whole = any_schedule(name, warmup_steps)
    first = whole.model_copy(update={"steps": steps})
    second = first.model_copy(update={"first_step": cut})
    rates = [learning_rate(first, step, cut) for step in range(cut)]
    rates += [learning_rate(second, step, steps - cut) for step in range(steps - cut)]
    assert rates == [learning_rate(whole, step, steps) for step in range(steps)]


def test_two_phases_that_share_one_cosine() -> None:
    settings = {"peak": 1e-3, "steps": 1100, "warmup_steps": 100}
    first = LearningRateConfig.model_validate(settings)
    second = LearningRateConfig.model_validate(settings | {"first_step": 850})
    assert learning_rate(first, 0, 850) == pytest.approx(1e-3 / 101)
    assert learning_rate(first, 100, 850) == 1e-3
    falling = {0: 0.5 * (1 + math.cos(math.pi * 750 / 999)), 249: 0.0}
    found = {step: learning_rate(second, step, 250) for step in falling}
    assert found == pytest.approx({step: 1e-3 * each for step, each in falling.items()}, abs=1e-15)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_phase_that_goes_on_beyond_its_schedule_stays_at_the_end(name: str) -> None:
    config = any_schedule(name, 0).model_copy(update={"steps": 10, "first_step": 5})
    rates = [learning_rate(config, step, 8) for step in range(8)]
    assert rates[3] > rates[4] == pytest.approx(0.1)
    assert rates[4:] == [rates[4]] * 4
