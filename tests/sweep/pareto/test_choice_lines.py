"""Which points are joined, and how much of the noise of seeds their error bars leave out."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_support import record_of

from megaphase.sweep.pareto.choice_lines import model_lines, pretraining_lines, steps_of
from megaphase.sweep.pareto.fronts import fronts_of
from megaphase.sweep.pareto.points import best_of
from megaphase.sweep.pareto.seed_noise import error_sentence, without_shared_shift
from megaphase.sweep.pareto.statistics import estimate

PEAKS = [0.001, 0.004]
ARMS = {
    "static": {"rates": [0.1, 0.5]},
    "two-phase": {"rates": [0.1, 0.5], "pretrain": [0.5, 0.7, 0.8]},
    "keep": {"rates": [0.25], "pretrain": [0.5, 0.8]},
    "phases": {
        "phases": [
            {"share": [0.3, 0.5], "rate": 0},
            {"share": 0.2, "rate": [0.1, 0.2]},
            {"rate": 0.5, "settings": {"model.dropout": [0.1, 0.2]}},
        ]
    },
    "own": {
        "budget": "own",
        "phases": [{"steps": [20, 40, 60], "rate": 0}, {"steps": 9, "rate": 1}],
    },
}  # fmt: skip


def points_with(random, **more):
    record = record_of(
        ARMS,
        lambda _: (4 + random.random(), 6 + random.random()),
        learning_rate={"peaks": PEAKS},
        **more,
    )
    return [point for fronts in fronts_of(record) for point in fronts.points]


def differing(one, other):
    """Return the names of what differs between two settings."""
    first, second = dict(one.setting.values), dict(other.setting.values)
    return {axis for axis in first.keys() | second.keys() if first.get(axis) != second.get(axis)}


@settings(deadline=None, max_examples=15)
@given(st.randoms(use_true_random=False))
def test_lines_over_the_length_join_what_differs_in_it_alone(random):
    points = points_with(random)
    for fixed in ("total", "last phase"):
        found = pretraining_lines(points, fixed)
        for line in found.lines:
            places = [x for x, _ in line.points]
            assert places == sorted(set(places))
            assert len(places) > 1
            for (_, one), (_, other) in product(line.points, line.points):
                assert one.setting.arm == other.setting.arm == line.arm
                assert one.setting.peaks == other.setting.peaks
                assert one.setting.mixture == other.setting.mixture
                assert differing(one, other) <= {
                    "pretrain_share", "phases[0].share", "phases[0].steps",
                }  # fmt: skip
                first, second = steps_of(one), steps_of(other)
                assert first[1:-1] == second[1:-1]
                same = sum if fixed == "total" else lambda steps: steps[-1]
                assert same(first) == same(second)
        drawn = [id(point) for _, point in found.all]
        assert len(set(drawn)) == len(drawn)
        arms = {"two-phase", "keep", "phases"} if fixed == "total" else {"own"}
        assert set(found.arms) == arms


@settings(deadline=None, max_examples=15)
@given(st.randoms(use_true_random=False))
def test_the_best_of_every_length_is_shown(random):
    points = points_with(random)
    shown = {id(point) for _, point in pretraining_lines(points, "total").all}
    for share, rate in product((0.5, 0.7, 0.8), (0.1, 0.5)):
        own = [
            point
            for point in points
            if point.setting.arm == "two-phase"
            and (point.setting.share, point.setting.mixture.rate) == (share, rate)
        ]
        assert id(best_of(own)) in shown


@settings(deadline=None, max_examples=10)
@given(st.randoms(use_true_random=False))
def test_lines_over_models_join_the_same_setting(random):
    models = {"small": {}, "medium": {}, "large": {}}
    points = points_with(random, models=models)
    found = model_lines(points, list(models))
    shown = {id(point) for _, point in found.all}
    for arm, model in product(ARMS, models):
        own = [p for p in points if (p.setting.arm, p.setting.model) == (arm, model)]
        assert id(best_of(own)) in shown
    for line in found.lines:
        assert len({(p.setting.values, p.setting.peaks) for _, p in line.points}) == 1
        assert [list(models)[int(x)] for x, _ in line.points] == [
            p.setting.model for _, p in line.points
        ]


values = st.lists(
    st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=2, max_size=6
)  # fmt: skip


def by_seed(rows):
    return [dict(enumerate(row)) for row in rows]


@given(values, st.lists(st.floats(-9, 9), min_size=3, max_size=3))
def test_a_shift_that_all_settings_share_is_no_noise(rows, shift):
    shifted = [[value + own for value, own in zip(row, shift, strict=True)] for row in rows]
    plain, found = without_shared_shift(by_seed(rows)), without_shared_shift(by_seed(shifted))
    for row, one, other in zip(shifted, plain, found, strict=True):
        assert other.error == pytest.approx(one.error, abs=1e-9)
        assert other.mean == estimate(row).mean
        assert other.n == 3


@given(
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
)
def test_intervals_of_two_settings_are_those_of_their_difference(one, other):
    """As that of two independent means, the error of their difference is the paired one."""
    found = without_shared_shift(by_seed([one, other]))
    paired = estimate([a - b for a, b in zip(one, other, strict=True)])
    error = math.hypot(*(each.error for each in found))
    assert error == pytest.approx(paired.error, abs=1e-9)


def test_independent_noise_keeps_its_size():
    draws = np.random.default_rng(3).normal(0, 1, (400, 20, 3))
    variances = [
        [each.error**2 for each in without_shared_shift(by_seed(sweep.tolist()))] for sweep in draws
    ]
    assert np.mean(variances) == pytest.approx(1 / 3, rel=0.02)


def test_settings_without_all_seeds_keep_the_whole_interval():
    full, part = {1: 1.0, 2: 3.0}, {1: 5.0}
    found = without_shared_shift([full, {1: 2.0, 2: 4.0}, part])
    assert [each.error for each in found] == [0.0, 0.0, None]
    assert without_shared_shift([full, part])[0].error == estimate([1.0, 3.0]).error
    assert without_shared_shift([]) == []


@pytest.mark.parametrize(
    ("ended", "ending"),
    [
        (lambda trial: True, "Morey’s correction). "),
        (lambda trial: trial.seed < 3 or trial.mixture.rate == 0.1, "have the whole interval. "),
        (lambda trial: trial.seed == 1, ""),
    ],
)
def test_captions_say_what_the_bars_are(ended, ending):
    arms = {"static": {"rates": [0.1, 0.2, 0.5]}}
    grid = {"peaks": [0.001, 0.004]}
    record = record_of(arms, lambda _: (4, 6), seeds=[1, 2, 3], ended=ended, learning_rate=grid)
    sentence = error_sentence([point for fronts in fronts_of(record) for point in fronts.points])
    assert sentence.endswith(ending)
    assert bool(sentence) == bool(ending)
