"""The blend keeps every task within one sample of its rate, or draws tasks independently."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import LARGEST, blend, blend_of_rates, normalised

from megaphase.plan import _builder
from megaphase.plan.index import block_size
from megaphase.plan.mixture import (
    integer_weights,
)


def largest_deviation(rates: list[Fraction], tasks: np.ndarray) -> Fraction:
    """Return max |count_t(n) - rate_t n| over every prefix and task, in rational arithmetic.

    A task's deviation is extreme just before and just after one of its turns, and at the end.
    """
    turns = [0] * len(rates)
    largest = Fraction(0)
    for slot, task in enumerate(tasks.tolist()):
        before = rates[task] * slot - turns[task]
        turns[task] += 1
        after = turns[task] - rates[task] * (slot + 1)
        largest = max(largest, before, after)
    return max(largest, *(abs(r * len(tasks) - n) for r, n in zip(rates, turns, strict=True)))


def deviation_at_every_prefix(rates: list[Fraction], tasks: np.ndarray) -> Fraction:
    counts = [0] * len(rates)
    largest = Fraction(0)
    for n, task in enumerate(tasks.tolist(), start=1):
        counts[task] += 1
        largest = max(largest, *(abs(c - r * n) for c, r in zip(counts, rates, strict=True)))
    return largest


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 50) | st.integers(0, 10**9), min_size=1, max_size=12).filter(any),
    st.integers(1, 150),
)
def test_every_prefix_is_within_one_sample_of_the_rates(weights, samples):
    rates = normalised(weights)
    tasks = blend_of_rates(rates, samples)
    assert deviation_at_every_prefix(rates, tasks) < 1
    assert largest_deviation(rates, tasks) < 1
    assert all(weights[task] > 0 for task in tasks)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_rates_over_nine_orders_of_magnitude(data):
    exponents = data.draw(st.lists(st.floats(-9, 0), min_size=2, max_size=60))
    weights = [Fraction(10**exponent) for exponent in exponents]
    total = sum(weights)
    rates = [weight / total for weight in weights]
    assert largest_deviation(rates, blend_of_rates(rates, 3000)) < 1


def test_a_task_with_a_rate_of_1e_9_takes_no_turn_too_many():
    rates = [1 - Fraction(1, 10**9), Fraction(1, 10**9)]
    tasks = blend_of_rates(rates, 20_000)
    assert largest_deviation(rates, tasks) < 1
    assert tasks.sum() <= 1


def test_five_thousand_tasks():
    weights = np.random.default_rng(3).zipf(1.3, 5000).clip(1, 10**8).tolist()
    weights[17] = weights[4711] = 0
    rates = normalised(weights)
    tasks, counts = blend(integer_weights(rates, 60_000, LARGEST), 60_000)
    assert largest_deviation(rates, tasks) < 1
    assert not np.isin(tasks, [17, 4711]).any()
    block = block_size(5000)
    for row in range(len(counts)):
        assert np.array_equal(counts[row], np.bincount(tasks[: row * block], minlength=5000))


def test_a_blend_is_the_same_every_time_and_in_pieces():
    weights = integer_weights(normalised([5, 3, 3, 1, 0]), 5000, LARGEST)
    whole, _ = blend(weights, 5000)
    again, _ = blend(weights, 5000)
    assert np.array_equal(whole, again)
    edf = _builder.DeadlineBlend(weights)
    pieces = [np.zeros(n, np.uint16) for n in (2048, 1024, 1928)]
    for piece in pieces:
        edf.fill(piece, np.zeros((-(-len(piece) // 1024), 5), np.int64), 1024)
    assert np.array_equal(np.concatenate(pieces), whole)
    assert edf.position == 5000
    assert edf.counts == np.bincount(whole, minlength=5).tolist()


def test_more_than_65536_tasks_are_numbered_in_32_bits():
    weights = integer_weights(normalised([1] * 70_000), 70_000, LARGEST)
    tasks, _ = blend(weights, 70_000)
    assert tasks.dtype == np.uint32
    assert sorted(tasks.tolist()) == list(range(70_000))


@pytest.mark.parametrize("weights", [[], [0, 0], [LARGEST, 1]])
def test_weights_that_make_no_blend_are_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        _builder.DeadlineBlend(weights)


def test_ordinals_of_any_range_are_those_of_the_whole():
    weights = integer_weights(normalised([7, 2, 1]), 3000, LARGEST)
    tasks, counts = blend(weights, 3000)
    seen = [0, 0, 0]
    expected = []
    for task in tasks.tolist():
        expected.append(seen[task])
        seen[task] += 1
    for first, last in [(0, 3000), (0, 1), (1023, 1025), (1024, 2048), (2999, 3000), (5, 5)]:
        ordinals = np.empty(last - first, np.int64)
        _builder.phase_ordinals(tasks, counts, block_size(3), first, ordinals)
        assert ordinals.tolist() == expected[first:last]
    with pytest.raises(ValueError, match="outside the phase"):
        _builder.phase_ordinals(tasks, counts, block_size(3), 2999, np.empty(2, np.int64))


def slow_deadline_blend(rates: list[Fraction], samples: int) -> list[int]:
    """Compute earliest deadline first by definition: slot after slot, in rational arithmetic."""
    turns = [0] * len(rates)
    tasks = []
    for slot in range(samples):
        released = [
            (ceil((turns[task] + 1) / rate), task)
            for task, rate in enumerate(rates)
            if rate > 0 and floor(turns[task] / rate) <= slot
        ]
        _, task = min(released)
        turns[task] += 1
        tasks.append(task)
    return tasks


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 9) | st.integers(0, 10**6), min_size=1, max_size=20).filter(any),
    st.integers(1, 300),
    st.sampled_from([1, 2, 3, 64, 65, 1024]),
)
def test_the_blend_is_earliest_deadline_first_whatever_its_blocks(weights, samples, block):
    tasks = np.zeros(samples, np.uint16)
    counts = np.zeros((-(-samples // block), len(weights)), np.int64)
    _builder.DeadlineBlend(weights).fill(tasks, counts, block)
    assert tasks.tolist() == slow_deadline_blend(normalised(weights), samples)


def test_the_blend_of_65535_tasks_is_balanced():
    weights = np.random.default_rng(5).lognormal(0, 2, 65_535).astype(np.int64) + 1
    tasks, _ = blend(weights.tolist(), 1_500_000)
    total = int(weights.sum())
    turns = np.zeros(65_535, np.int64)
    # A task's deviation is extreme just before and just after its own turns; in whole numbers.
    order = np.argsort(tasks, kind="stable")
    starts = np.searchsorted(tasks[order], np.arange(65_535))
    turns = np.arange(len(tasks)) - starts[tasks[order]]
    ideal = weights[tasks[order]] * order
    after = weights[tasks[order]] * (order + 1)
    assert (np.abs(ideal - turns * total) < total).all()
    assert (np.abs(after - (turns + 1) * total) < total).all()
    counts = np.bincount(tasks, minlength=65_535)
    assert (np.abs(weights * len(tasks) - counts * total) < total).all()


def random_blend(weights: list[int], samples: int, key: int = 5) -> np.ndarray:
    tasks = np.zeros(samples, np.uint16)
    block = block_size(len(weights))
    counts = np.zeros((-(-samples // block), len(weights)), np.int64)
    drawn = _builder.RandomBlend(weights, key)
    drawn.fill(tasks, counts, block)
    assert drawn.counts == np.bincount(tasks, minlength=len(weights)).tolist()
    return tasks


@pytest.mark.parametrize("weights", [[1], [1, 1], [7, 2, 1, 0, 90], [10**12, 1], list(range(300))])
def test_random_draws_follow_the_rates_and_each_other_not_at_all(weights):
    samples = 400_000
    tasks = random_blend(weights, samples)
    counts = np.bincount(tasks, minlength=len(weights))
    expected = samples * np.array(weights) / sum(weights)
    assert (counts[expected == 0] == 0).all()
    spread = np.sqrt(np.maximum(expected * (1 - expected / samples), 0))
    assert (np.abs(counts - expected) <= 5 * spread + 1e-9).all()
    # Independent: a task follows itself as often as by chance (5 sigma), at several distances.
    together = float((expected / samples) @ (expected / samples))
    for distance in (1, 2, 1024):
        same = (tasks[distance:] == tasks[:-distance]).mean()
        assert abs(same - together) <= 5 * np.sqrt(together * (1 - together) / samples) + 1e-9


def test_random_draws_depend_on_the_key_and_the_slot_alone():
    weights = [5, 3, 2]
    whole = random_blend(weights, 5000)
    assert np.array_equal(random_blend(weights, 3000), whole[:3000])
    assert not np.array_equal(random_blend(weights, 5000, key=6), whole)
    pieces = [np.zeros(n, np.uint16) for n in (2048, 1024, 1928)]
    drawn = _builder.RandomBlend(weights, 5)
    for piece in pieces:
        drawn.fill(piece, np.zeros((-(-len(piece) // 1024), 3), np.int64), 1024)
    assert np.array_equal(np.concatenate(pieces), whole)


def test_a_type_too_small_for_the_tasks_is_refused():
    counts = np.zeros((1, 70_000), np.int64)
    with pytest.raises(ValueError, match="cannot number"):
        _builder.DeadlineBlend([1] * 70_000).fill(np.zeros(10, np.uint16), counts, 1024)
