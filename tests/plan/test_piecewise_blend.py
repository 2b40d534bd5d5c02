"""A blend whose rates change keeps every task within one sample of the sum of its rates."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import blend

from megaphase.plan import _builder
from megaphase.plan.index import block_size, task_dtype

UNIT = 1 << 20


def piecewise(
    sizes: list[int], shares: list[list[int]]
) -> tuple[np.ndarray, np.ndarray, list[list[Fraction]]]:
    """Return (bounds, weights [tasks, pieces], cumulative rates [samples + 1][tasks]).

    shares: [pieces][tasks], whole numbers in proportion to which the rates of a piece are
    """
    bounds = np.cumsum([0, *sizes]).astype(np.uint64)
    columns = []
    for size, piece in zip(sizes, shares, strict=True):
        total = size * UNIT
        column = [total * share // sum(piece) for share in piece]
        column[piece.index(max(piece))] += total - sum(column)
        columns.append(column)
    sums = [[Fraction(0)] * len(shares[0])]
    for size, column in zip(sizes, columns, strict=True):
        rates = [Fraction(weight, size * UNIT) for weight in column]
        for _ in range(size):
            sums.append([a + b for a, b in zip(sums[-1], rates, strict=True)])
    return bounds, np.array(columns, np.uint64).T.copy(), sums


def filled(blend, samples: int, tasks: int, block: int | None = None) -> np.ndarray:
    block = block or block_size(tasks)
    order = np.zeros(samples, task_dtype(tasks))
    counts = np.zeros((-(-samples // block), tasks), np.int64)
    blend.fill(order, counts, block)
    for row in range(len(counts)):
        assert counts[row].tolist() == np.bincount(order[: row * block], minlength=tasks).tolist()
    assert blend.counts == np.bincount(order, minlength=tasks).tolist()
    return order


def deviation(sums: list[list[Fraction]], order: np.ndarray) -> Fraction:
    """Return max |count_t(n) - sum of task t's rates up to n| over every prefix and task."""
    counts = [0] * len(sums[0])
    largest = Fraction(0)
    for before, task in zip(sums[1:], order.tolist(), strict=True):
        counts[task] += 1
        largest = max(largest, *(abs(c - s) for c, s in zip(counts, before, strict=True)))
    return largest


def slow_deadline_blend(
    sums: list[list[Fraction]], samples: int, last: list[Fraction]
) -> list[int]:
    """Compute earliest deadline first by definition, slot after slot, in rational arithmetic.

    last: the rates after the last sample
    """
    tasks = range(len(sums[0]))
    turns, order = [0] * len(tasks), []

    def deadline(task: int) -> Fraction:
        end = turns[task] + 1
        for slot, values in enumerate(sums):
            if values[task] >= end:
                return Fraction(slot)
        left = end - sums[-1][task]
        if last[task] == 0:
            return Fraction(10**30)
        slots = left / last[task]
        return Fraction(samples - (-slots.numerator // slots.denominator))

    for slot in range(samples):
        released = [task for task in tasks if sums[slot + 1][task] > turns[task]]
        _, task = min((deadline(task), task) for task in released)
        turns[task] += 1
        order.append(task)
    return order


@st.composite
def rates_in_pieces(draw, most_tasks: int = 8):
    tasks = draw(st.integers(1, most_tasks))
    pieces = draw(st.integers(1, 8))
    share = st.integers(0, 9) | st.integers(0, 10**5)
    shares = [
        draw(st.lists(share, min_size=tasks, max_size=tasks).filter(any)) for _ in range(pieces)
    ]
    sizes = draw(st.lists(st.integers(1, 40), min_size=pieces, max_size=pieces))
    return sizes, shares


@settings(max_examples=80, deadline=None)
@given(rates_in_pieces(), st.sampled_from([1, 2, 3, 64, 65, 1024]))
def test_every_prefix_is_within_one_sample_of_the_sum_of_the_rates(drawn, block):
    sizes, shares = drawn
    bounds, weights, sums = piecewise(sizes, shares)
    samples, tasks = sum(sizes), len(shares[0])
    order = filled(_builder.PiecewiseDeadlineBlend(bounds, weights), samples, tasks, block)
    assert deviation(sums, order) < 1
    last = [b - a for a, b in zip(sums[-2], sums[-1], strict=True)]
    assert order.tolist() == slow_deadline_blend(sums, samples, last)
    # Where the sum of a task's rates is a whole number at the end, that is its count.
    for task, total in enumerate(sums[-1]):
        if total.denominator == 1:
            assert order.tolist().count(task) == total


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any),
    st.lists(st.integers(1, 300), min_size=1, max_size=6),
)
def test_equal_pieces_are_a_blend_of_constant_rates(shares, sizes):
    total = sum(shares)
    bounds = np.cumsum([0, *sizes]).astype(np.uint64)
    weights = np.array([[share * size for size in sizes] for share in shares], np.uint64)
    samples = sum(sizes)
    order = filled(_builder.PiecewiseDeadlineBlend(bounds, weights), samples, len(shares))
    assert total > 0
    assert order.tolist() == blend(shares, samples)[0].tolist()


@pytest.mark.parametrize("backwards", [False, True])
def test_a_rate_that_begins_or_ends_at_zero(backwards):
    pieces = 200
    shares = [[2 * p + 1, 2 * (pieces - p) - 1, 0] for p in range(pieces)]
    if backwards:
        shares.reverse()
    bounds, weights, sums = piecewise([50] * pieces, shares)
    order = filled(_builder.PiecewiseDeadlineBlend(bounds, weights), 50 * pieces, 3)
    assert deviation(sums, order) < 1
    half = np.bincount(order[: 25 * pieces], minlength=3)
    assert half[0] == pytest.approx((3 if backwards else 1) * 50 * pieces / 8, abs=1)
    assert half[2] == 0


def test_a_task_without_a_rate_for_some_pieces_takes_no_turn_too_many():
    """Its sum of rates is a whole number when its rate becomes zero, and stays it."""
    sizes = [8, 1000, 8, 1000]
    bounds, weights, sums = piecewise(sizes, [[1, 1], [0, 1], [1, 1], [0, 1]])
    order = filled(_builder.PiecewiseDeadlineBlend(bounds, weights), sum(sizes), 2)
    assert deviation(sums, order) < 1
    assert order[:8].tolist().count(0) == order[1008:1016].tolist().count(0) == 4
    assert order.tolist().count(0) == 8


def test_many_tasks_over_many_pieces_and_many_orders_of_magnitude():
    generator = np.random.default_rng(2)
    tasks, pieces, size = 700, 64, 400
    start, end = (10 ** generator.uniform(-7, 0, tasks) for _ in range(2))
    shares = [
        (1e9 * (start + (end - start) * p / pieces)).astype(np.int64).tolist()
        for p in range(pieces)
    ]
    bounds = (np.arange(pieces + 1) * size).astype(np.uint64)
    unit = 1 << 44
    columns = []
    for piece in shares:
        column = [unit * size * share // sum(piece) for share in piece]
        column[int(np.argmax(piece))] += unit * size - sum(column)
        columns.append(column)
    weights = np.array(columns, np.uint64).T.copy()
    order = filled(_builder.PiecewiseDeadlineBlend(bounds, weights), pieces * size, tasks)
    for task in range(tasks):
        turns = np.flatnonzero(order == task).tolist()
        sums = [0]
        for column in columns:
            sums.append(sums[-1] + column[task])

        def at(n: int, sums: list[int] = sums, task: int = task) -> Fraction:
            piece = min(n // size, pieces - 1)
            part = Fraction(columns[piece][task] * (n - piece * size), size)
            return (sums[piece] + part) / unit

        # A deviation is extreme just before and just after a turn, and at the end.
        for number, slot in enumerate(turns):
            assert abs(at(slot) - number) < 1
            assert abs(at(slot + 1) - number - 1) < 1
        assert abs(at(len(order)) - len(turns)) < 1


@settings(max_examples=25, deadline=None)
@given(rates_in_pieces(most_tasks=4), st.integers(0, 5))
def test_a_blend_in_parts_is_that_of_the_whole(drawn, parts):
    sizes, shares = drawn
    bounds, weights, _ = piecewise(sizes, shares)
    samples, tasks = sum(sizes), len(shares[0])
    for make in (
        lambda: _builder.PiecewiseDeadlineBlend(bounds, weights),
        lambda: _builder.PiecewiseRandomBlend(bounds, weights, 7),
    ):
        whole = filled(make(), samples, tasks)
        found, some = make(), []
        ends = sorted({0, samples, *(samples * p // (parts + 1) for p in range(parts + 1))})
        for first, last in pairwise(ends):
            part = np.zeros(last - first, np.uint16)
            # A range begins at the start of a block.
            found.fill(part, np.zeros((last - first, tasks), np.int64), 1)
            some += part.tolist()
        assert some == whole.tolist()


def test_random_draws_follow_the_rates_of_their_piece():
    sizes, shares = [100_000, 1, 50_000, 150_000], [[1, 1, 0], [0, 0, 1], [9, 0, 1], [1, 8, 1]]
    bounds, weights, _ = piecewise(sizes, shares)
    order = filled(_builder.PiecewiseRandomBlend(bounds, weights, 5), sum(sizes), 3)
    first = 0
    for size, piece in zip(sizes, shares, strict=True):
        counts = np.bincount(order[first : first + size], minlength=3)
        rates = np.array(piece) / sum(piece)
        spread = np.sqrt(size * rates * (1 - rates))
        assert (np.abs(counts - size * rates) <= 5 * spread + 1e-9).all()
        first += size


def test_random_draws_of_equal_pieces_are_those_of_constant_rates():
    weights = np.array([[5 * 300, 5 * 700], [3 * 300, 3 * 700], [0, 0]], np.uint64)
    bounds = np.array([0, 300, 1000], np.uint64)
    order = filled(_builder.PiecewiseRandomBlend(bounds, weights, 9), 1000, 3)
    assert order.tolist() == filled(_builder.RandomBlend([5, 3, 0], 9), 1000, 3).tolist()


@pytest.mark.parametrize(
    ("bounds", "weights", "message"),
    [
        ([0], [[1]], "bounds is"),
        ([0, 10], [[1, 2]], "bounds is"),
        ([1, 10], [[9]], "begin with 0"),
        ([0, 10, 10], [[10, 10]], "a piece is empty"),
        ([0, 10], [[0]], "no task has a weight"),
        ([0, 10], [[15]], "do not sum to its slots"),
        ([0, 10, 20], [[10, 20]], "do not sum to its slots"),
        ([0, 10], [[2**63]], r"weights exceed 2\^62"),
    ],
)
def test_rates_that_make_no_blend_are_refused(bounds, weights, message):
    with pytest.raises(ValueError, match=message):
        _builder.PiecewiseDeadlineBlend(np.array(bounds, np.uint64), np.array(weights, np.uint64))
