"""Intervals and the expected best of k settings, against plain formulas and enumeration."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphase.sweep.pareto.statistics import (
    best_of_weights,
    chance_of_less,
    estimate,
    holm,
)

# Two-sided 95 % quantiles of Student's t, from a printed table.
QUANTILES = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262}
values_of_seeds = st.lists(st.floats(-10, 10), min_size=2, max_size=6)


def p_with_2_degrees(t):
    """Return the two-sided p of Student's t with 2 degrees of freedom, which has a closed form."""
    return 1 - abs(t) / math.sqrt(t * t + 2)


@pytest.mark.parametrize("degrees", QUANTILES)
def test_interval_is_that_of_the_printed_table(degrees):
    values = [0.3 * i * i - 1 for i in range(degrees + 1)]
    n = len(values)
    mean = sum(values) / n
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    found = estimate(values)
    assert (found.mean, found.error, found.n) == (pytest.approx(mean), pytest.approx(error), n)
    assert found.high - mean == pytest.approx(QUANTILES[degrees] * error, rel=3e-4)
    assert mean - found.low == pytest.approx(QUANTILES[degrees] * error, rel=3e-4)


def test_t_and_p_of_three_seeds():
    found = estimate([0.1, 0.05, 0.0269])
    error = np.std([0.1, 0.05, 0.0269], ddof=1) / math.sqrt(3)
    t = np.mean([0.1, 0.05, 0.0269]) / error
    assert found.t == pytest.approx(t)
    assert found.p == pytest.approx(p_with_2_degrees(t))
    assert found.sign == 0
    assert estimate([0.1, 0.11, 0.12]).sign == 1
    assert estimate([-0.1, -0.11, -0.12]).sign == -1


def test_one_seed_has_no_interval():
    found = estimate([1.5])
    assert (found.mean, found.error, found.low, found.high, found.t, found.p) == (
        1.5, None, None, None, None, None,
    )  # fmt: skip
    assert found.sign == 0


def test_equal_values_differ_from_zero_by_more_than_rounding():
    assert (estimate([0.1] * 3).sign, estimate([0.1] * 3).p) == (1, 0)
    assert (estimate([1e-15, 2e-15, 3e-15]).sign, estimate([0.0] * 3).p) == (0, 1)


@given(values_of_seeds)
def test_the_negative_has_the_negative_interval(values):
    one, other = estimate(values), estimate([-value for value in values])
    assert (other.mean, other.low, other.high) == (-one.mean, -one.high, -one.low)
    assert (other.sign, other.p) == (-one.sign, one.p)


def test_interval_covers_the_true_mean_in_95_of_100_sweeps():
    draws = np.random.default_rng(7).normal(0.3, 0.05, (4000, 3))
    found = [estimate(list(row)) for row in draws]
    covered = sum(each.low <= 0.3 <= each.high for each in found) / len(found)
    assert 0.94 < covered < 0.96
    twice = sum(abs(each.mean - 0.3) <= 2 * each.error for each in found) / len(found)
    assert twice < 0.84  # why two standard errors are not enough


@settings(deadline=None)
@given(st.data(), st.lists(st.floats(-5, 5), min_size=1, max_size=7))
def test_expected_best_of_k_is_that_of_all_subsets(data, values):
    k = data.draw(st.integers(1, len(values)))
    subsets = list(combinations(values, k))
    ordered = sorted(values)
    found = math.fsum(
        weight * value
        for weight, value in zip(best_of_weights(len(values), k), ordered, strict=True)
    )
    mean = sum(min(subset) for subset in subsets) / len(subsets)
    assert found == pytest.approx(mean, abs=1e-12)


def test_best_of_all_settings_is_the_best():
    assert best_of_weights(4, 4) == [1, 0, 0, 0]
    assert best_of_weights(4, 1) == [0.25] * 4
    assert best_of_weights(3, 2) == pytest.approx([2 / 3, 1 / 3, 0])


def test_chance_of_less_is_that_of_all_pairs_of_subsets():
    own, other = [1.0, 2.5, 4.0, 6.0], [2.0, 2.5, 3.0]
    k = 2
    pairs = [
        (min(a), min(b)) for a in combinations(own, k) for b in combinations(other, k)
    ]  # fmt: skip
    expected = sum((a < b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    weights = best_of_weights(4, k), best_of_weights(3, k)
    assert chance_of_less(own, weights[0], other, weights[1]) == pytest.approx(expected)
    back = chance_of_less(other, weights[1], own, weights[0])
    assert back == pytest.approx(1 - expected)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
