"""Mixtures give the promised rates: requested, capped over the whole run, as integers."""

from __future__ import annotations

from decimal import Decimal, getcontext
from fractions import Fraction
from math import lcm

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import LARGEST, blend_of_rates, normalised

from megaphase.plan.mixture import (
    MixtureConfig,
    TaskSupply,
    effective_rates,
    integer_weights,
    requested_rates,
)
from megaphase.utils.errors import InputError


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any),
    st.integers(1, 10**9),
    st.integers(0, 2**62),
)
def test_integer_weights_sum_and_stay_within_one(weights, samples, largest):
    largest = max(largest, samples)
    rates = normalised(weights)
    found = integer_weights(rates, samples, largest)
    total = sum(found)
    assert total <= largest
    common = lcm(*(rate.denominator for rate in rates))
    if common <= largest:
        assert found == [rate * common for rate in rates]
        return
    assert largest - samples < total
    assert total % samples == 0
    for weight, rate in zip(found, rates, strict=True):
        assert abs(weight - rate * total) < 1
        if (rate * samples).denominator == 1:
            assert weight == rate * total


def supplies(tokens: list[int], per_epoch: list[int] | None = None) -> dict[str, TaskSupply]:
    per_epoch = per_epoch or [max(1, n // 10) for n in tokens]
    return {
        f"t{i}": TaskSupply(n, samples, 0)
        for i, (n, samples) in enumerate(zip(tokens, per_epoch, strict=True))
    }


TOKENS = st.lists(st.integers(10, 10**12), min_size=1, max_size=12)


@settings(deadline=None)
@given(TOKENS, st.sampled_from([0.01, 0.5, 1.0, 1.7, 3.3, 5.0, 100.0]))
def test_temperature_is_tokens_to_the_power_of_its_inverse(tokens, temperature):
    getcontext().prec = 50
    supply = supplies(tokens)
    rates = requested_rates(MixtureConfig(temperature=temperature), supply)
    powers = [(Decimal(n).ln() / Decimal(temperature)).exp() for n in tokens]
    assert sum(rates.values()) == 1
    for rate, power in zip(rates.values(), powers, strict=True):
        assert float(rate) == pytest.approx(float(power / sum(powers)), rel=1e-9, abs=1e-300)


@settings(deadline=None)
@given(TOKENS)
def test_proportional_rates_follow_the_tokens(tokens):
    rates = requested_rates(MixtureConfig(proportional=True), supplies(tokens))
    for rate, n in zip(rates.values(), tokens, strict=True):
        assert float(rate) == pytest.approx(n / sum(tokens), rel=1e-12)


def test_tasks_outside_a_mixture_get_nothing():
    supply = supplies([100, 200, 300])
    over = requested_rates(MixtureConfig(temperature=2.0, over=["t0", "t2"]), supply)
    assert over["t1"] == 0
    assert over["t0"] + over["t2"] == 1
    given_rates = requested_rates(MixtureConfig(rates={"t2": 0.25, "t0": 0.75}), supply)
    assert given_rates == {"t0": Fraction(3, 4), "t1": 0, "t2": Fraction(1, 4)}
    nearly = requested_rates(MixtureConfig(rates={"t0": 0.3333333, "t1": 0.6666667}), supply)
    assert sum(nearly.values()) == 1


def water_level(requested: list[Fraction], room: list[int], samples: int) -> list[Fraction]:
    """Return shares min(level p, room) that sum to samples, found by iterating over the caps."""
    order = sorted((i for i, p in enumerate(requested) if p), key=lambda i: room[i] / requested[i])
    full, weight = 0, sum(requested)
    for i in order:
        level = (samples - full) / weight
        if level * requested[i] <= room[i]:
            break
        full += room[i]
        weight -= requested[i]
    else:
        level = Fraction(0) if not weight else (samples - full) / weight
    return [
        min(level * p, Fraction(room[i])) if level else Fraction(room[i])
        for i, p in enumerate(requested)
    ]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_capped_tasks_hand_over_to_the_others(data):
    n = data.draw(st.integers(1, 8))
    weights = data.draw(st.lists(st.integers(0, 20), min_size=n, max_size=n).filter(any))
    supply = {
        f"t{i}": TaskSupply(100, data.draw(st.integers(1, 60)), data.draw(st.integers(0, 100)))
        for i in range(n)
    }
    max_epochs = data.draw(st.sampled_from([0.5, 1.0, 2.0, 3.7]))
    samples = data.draw(st.integers(1, 200))
    rates = {f"t{i}": weight / sum(weights) for i, weight in enumerate(weights)}
    mixture = MixtureConfig(rates=rates, max_epochs=max_epochs)
    room = [max(0, int(max_epochs * s.samples_per_epoch) - s.samples_used) for s in supply.values()]
    requested = list(requested_rates(mixture, supply).values())
    if sum(r for r, p in zip(room, requested, strict=True) if p) < samples:
        with pytest.raises(InputError, match="max_epochs"):
            effective_rates(mixture, supply, samples, "run.yaml: phases[0].mixture")
        return
    found = list(effective_rates(mixture, supply, samples, "").values())
    assert [rate * samples for rate in found] == water_level(requested, room, samples)
    turns = np.bincount(blend_of_rates(found, samples), minlength=n)
    assert all(turn <= most for turn, most in zip(turns, room, strict=True))


def unimax(tokens: list[int], budget: int, max_epochs: int) -> list[Fraction]:
    """Algorithm 1 of UniMax (Chung et al. 2023): smallest first, an equal part of what is left."""
    given_out: dict[int, Fraction] = {}
    left = Fraction(budget)
    order = sorted(range(len(tokens)), key=lambda i: tokens[i])
    for done, i in enumerate(order):
        given_out[i] = min(left / (len(order) - done), Fraction(tokens[i] * max_epochs))
        left -= given_out[i]
    return [given_out[i] / sum(given_out.values()) for i in range(len(tokens))]


@settings(deadline=None)
@given(st.lists(st.integers(5, 500), min_size=1, max_size=10), st.integers(1, 4), st.data())
def test_unimax_is_its_published_algorithm(per_epoch, max_epochs, data):
    samples = data.draw(st.integers(1, sum(per_epoch) * max_epochs))
    supply = supplies(per_epoch, per_epoch)
    mixture = MixtureConfig(unimax=True, max_epochs=max_epochs)
    found = effective_rates(mixture, supply, samples, "")
    assert list(found.values()) == unimax(per_epoch, samples, max_epochs)


def test_a_cap_holds_over_the_whole_run():
    supply = {"en": TaskSupply(0, 1000, 0), "hi": TaskSupply(0, 10, 35), "eu": TaskSupply(0, 5, 40)}
    mixture = MixtureConfig(rates={"en": 0.2, "hi": 0.4, "eu": 0.4}, max_epochs=4)
    rates = effective_rates(mixture, supply, 100, "")
    assert rates == {"en": Fraction(95, 100), "hi": Fraction(5, 100), "eu": 0}


def test_an_impossible_demand_names_its_figures():
    supply = {"en": TaskSupply(0, 1000, 500), "hi": TaskSupply(0, 10, 5)}
    mixture = MixtureConfig(rates={"en": 0.5, "hi": 0.5}, max_epochs=2.5)
    with pytest.raises(InputError) as error:
        effective_rates(mixture, supply, 5000, "run.yaml: phases[1].mixture")
    assert str(error.value) == (
        "run.yaml: phases[1].mixture: the phase wants 5,000 samples, but max_epochs 2.5 leaves "
        "only 2,020 (en 2,000, hi 20); raise max_epochs, shorten the phase or add tasks"
    )


def test_rates_are_the_decimal_numbers_that_were_written():
    mixture = MixtureConfig(rates={"t0": 1e-9, "t1": 0.3, "t2": 0.699999999})
    rates = requested_rates(mixture, supplies([10, 10, 10]))
    assert list(rates.values()) == [
        Fraction(1, 10**9), Fraction(3, 10), Fraction(699_999_999, 10**9),
    ]  # fmt: skip
    assert integer_weights(list(rates.values()), 12, LARGEST) == [1, 3 * 10**8, 699_999_999]
